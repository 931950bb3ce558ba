"""Frames by number are the frames that decoding everything yields; hostile input ends as an error."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from diffmae_video.data.decode import Video, VideoReader, probe, read_clips
from diffmae_video.data.images import read_image
from diffmae_video.data.media import Limits
from diffmae_video.errors import DataError

from .clips import make_video, read_number

STREAMS = {
    "plain": {"options": {"bf": "0"}},
    "shard": {"options": {"bf": "3", "tune": "fastdecode", "x264-params": "b-adapt=0:b-pyramid=none"}},
    "pyramid": {"options": {"bf": "3", "x264-params": "b-pyramid=normal:b-adapt=0"}},
    "open_gop": {"options": {"bf": "2", "x264-params": "open-gop=1:b-adapt=0"}},
    "intra": {"options": {"g": "1"}},
    "variable_rate": {"times": [0, 40, 50, 300, 310, 900, *range(1000, 2800, 100)]},
    "mkv": {"container": "matroska"},
    "ts": {"container": "mpegts"},
    "avi": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "vp8": {"container": "webm", "codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}},
    "mjpeg": {"container": "avi", "codec": "mjpeg"},
}


def reference(data: bytes) -> list[np.ndarray]:
    """Every frame, decoded in order by plain PyAV: uint8 (H, W, 3)."""
    with av.open(io.BytesIO(data), metadata_errors="replace") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_frames_by_number(kind: str, known: bool) -> None:
    data = make_video(**STREAMS[kind])
    expected = reference(data)
    assert [read_number(frame) for frame in expected] == list(range(24))
    draw = random.Random(0)
    wanted = [sorted(draw.choices(range(24), k=5)), [23], [0], [20, 3, 3, 11], list(range(0, 24, 4))]
    with Video(data, known=known) as video:
        assert video.info.frames == 24
        for _ in range(2):  # a second call finds the decoder used
            for clip, numbers in zip(video.clips(wanted), wanted, strict=True):
                assert clip.frames.dtype == torch.uint8
                assert [read_number(frame.permute(1, 2, 0).numpy()) for frame in clip.frames] == numbers
    clip = read_clips(data, [list(range(24))])[0]
    assert all(a < b for a, b in pairwise(clip.pts.tolist()))


def test_times_are_returned() -> None:
    times = STREAMS["variable_rate"]["times"]
    clip = read_clips(make_video(times=times), [[5, 2, 0]])[0]
    assert clip.pts.tolist() == pytest.approx([0.9, 0.05, 0.0])


def test_unreferenced_packets_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three droppable frames in a row, every fourth frame costs a quarter to a half of the packets."""
    data = make_video(**STREAMS["shard"], frames=33)
    decoded: list[int] = []
    with Video(data) as video:
        table = video._packets()
        table.packets = [_Spy(packet, decoded) for packet in table.packets]
        monkeypatch.setattr("diffmae_video.data.decode.is_unreferenced", _look_through)
        out = dict(video._by_table([1, 5, 9, 13]))
    assert sorted(out) == [1, 5, 9, 13]
    assert len(decoded) < 12


class _Spy:
    def __init__(self, packet: av.Packet, decoded: list[int]):
        self.packet, self.decoded = packet, decoded

    def decode(self) -> list[av.VideoFrame]:
        self.decoded.append(1)
        return self.packet.decode()


def _look_through(spy: _Spy, length: int) -> bool:
    data, position = bytes(spy.packet), 0
    while position + length < len(data):
        if 1 <= data[position + length] & 0x1F <= 5:
            return data[position + length] & 0x60 == 0
        position += length + int.from_bytes(data[position : position + length], "big")
    return False


@pytest.mark.parametrize("size", [(64, 48), (340, 256), (200, 112), (354, 492)])
def test_crop_and_scale(size: tuple[int, int]) -> None:
    """A crop is the slice of the whole frame, and a scaled crop is what torch's antialiased resize makes of it."""
    width, height = size
    data = make_video(frames=3, size=size)
    with Video(data) as video:
        whole = video.clips([[1]])[0].frames
        box = (8, 4, width // 2, height // 2)
        crop = video.clips([[1]], [box])[0].frames
        scaled = video.clips([[1]], [box], (32, 32))[0].frames
    full = torch.from_numpy(reference(data)[1]).permute(2, 0, 1)
    assert (whole[0].int() - full.int()).abs().max() <= 1
    assert torch.equal(crop[0], whole[0][:, 4 : 4 + height // 2, 8 : 8 + width // 2])
    expected = torch.nn.functional.interpolate(crop.float(), (32, 32), mode="bilinear", antialias=True)
    assert (scaled.float() - expected).abs().mean() < 4
    for _ in range(3):  # rows are written to their end
        assert torch.equal(read_clips(data, [[1]])[0].frames, whole)


@pytest.mark.parametrize("box", [(3, 1, 1, 1), (0, 0, 1, 8), (2, 5, 9, 1)])
def test_boxes_of_one_pixel(box: tuple[int, int, int, int]) -> None:
    data = make_video(frames=2, size=(16, 16))
    clip = read_clips(data, [[0, 1]], [box], (8, 8))[0].frames
    left, top, width, height = box
    full = torch.from_numpy(reference(data)[1])[top : top + height, left : left + width].float()
    assert clip.shape == (2, 3, 8, 8)
    assert (clip[1].float().mean((1, 2)) - full.mean((0, 1))).abs().max() < 6


def test_crop_outside_the_frame_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        read_clips(make_video(frames=2), [[0]], [(40, 0, 60, 48)])


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "empty"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "playlist"),
        (b"ffconcat version 1.0\nfile other.avi\n", "playlist"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "session"),
        (b"<?xml version='1.0'?><MPD></MPD>", "DASH"),
        (b"<html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
        (b"\xff\xd8\xff\xe0" + bytes(64), "JPEG"),
        (bytes(range(256)), "no known"),
    ],
)
def test_what_is_no_video_is_named(head: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        probe(head)


def test_playlists_open_no_socket(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        hits: list[object] = []

        def listen() -> None:
            with contextlib.suppress(TimeoutError):
                hits.append(server.accept())

        listener = threading.Thread(target=listen)
        listener.start()
        url = f"http://127.0.0.1:{port}/x.ts"
        for text in (f"#EXTM3U\n#EXTINF:1,\n{url}\n", f"ffconcat version 1.0\nfile {url}\n", f"<MPD><BaseURL>{url}"):
            path = tmp_path / "a.mp4"
            path.write_text(text)
            with pytest.raises(DataError):
                probe(path)
        listener.join()
    assert not hits


def test_limits_come_before_decoding() -> None:
    data = make_video(frames=12, size=(128, 96))
    with pytest.raises(DataError, match="pixels"):
        probe(data, Limits(pixels=64 * 64))
    with pytest.raises(DataError, match="frames"):
        probe(make_video(frames=12, container="matroska"), Limits(frames=5))
    with pytest.raises(DataError, match="bytes"):
        probe(data, Limits(bytes=100))
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(DataError, match="pixels"):
        read_image(buffer.getvalue())


def test_cut_file_stands_in_with_its_last_frame() -> None:
    data = make_video(container="mpegts")
    with Video(data[: len(data) // 2]) as video:
        available = sum(1 for _ in video.decode_all())
        assert 0 < available < 24
        clip = video.clips([[0, 23, available - 1]])[0]
    assert read_number(clip.frames[0].permute(1, 2, 0).numpy()) == 0
    assert torch.equal(clip.frames[1], clip.frames[2])


def test_video_reader_streams_all_frames() -> None:
    with VideoReader(make_video()) as reader:
        seen = [(read_number(rgb), pts) for rgb, pts in reader]
    assert [number for number, _ in seen] == list(range(24))
    assert [pts for _, pts in seen] == pytest.approx([0.1 * n for n in range(24)])


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP")])
def test_images_become_rgb(mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 10, 30)).convert(mode).save(buffer, kind)
    image = read_image(buffer.getvalue())
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8


def test_memory_and_descriptors_stay_flat() -> None:
    data = make_video()
    process = psutil.Process()

    def spin(times: int) -> None:
        for _ in range(times):
            read_clips(data, [[0, 8, 16]], [(0, 0, 40, 40)], (32, 32))

    spin(50)
    before, files = process.memory_info().rss, process.num_fds()
    spin(400)
    assert process.num_fds() <= files
    assert process.memory_info().rss - before < 8 << 20


def test_interpreter_exits_after_damage(tmp_path: Path) -> None:
    data = bytearray(make_video(frames=48))
    for place in range(len(data) // 3, len(data) // 2, 7):
        data[place] ^= 0x55
    (tmp_path / "damaged.mp4").write_bytes(data)
    program = (
        "import sys; from diffmae_video.data.decode import VideoReader\n"
        "from diffmae_video.errors import DataError\n"
        "try: print(sum(1 for _ in VideoReader(sys.argv[1])))\n"
        "except DataError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "damaged.mp4")]
    assert subprocess.run(command, timeout=60, capture_output=True, check=False).returncode == 0


# -- colours and scaling -------------------------------------------------------------------------------------------


def textured() -> np.ndarray:
    """A frame of slopes and squares, uint8 (240, 320, 3)."""
    y, x = np.mgrid[0:240, 0:320]
    return np.stack([60 + x * 0.4, 200 - y * 0.5, 90 + ((x // 16 + y // 16) % 2) * 60], -1).astype(np.uint8)


def encoded(frame: np.ndarray) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frame.shape[1], frame.shape[0], "yuv444p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return sink.getvalue()


def test_colours_come_back_without_an_offset() -> None:
    """Lossless YUV: each way of reading gives the colours that were written, a tenth of a level off at most."""
    frame = textured()
    data = encoded(frame)
    box = (32, 16, 256, 208)
    with Video(data) as video:
        whole, cropped = video.clips([[0]])[0].frames[0], video.clips([[0]], [box])[0].frames[0]
    ways = {
        "whole": (whole.numpy(), frame.transpose(2, 0, 1)),
        "cropped": (cropped.numpy(), frame[16:224, 32:288].transpose(2, 0, 1)),
        "reader": (next(iter(VideoReader(data)))[0], frame),
    }
    for name, (got, wanted) in ways.items():
        off = got.astype(float) - wanted
        assert abs(off.mean()) < 0.1, name
        assert np.abs(off).max() <= 3, name


@pytest.mark.parametrize("size", [(112, 149), (96, 96), (224, 298)])
def test_scaling_is_pils_antialiased_bilinear(size: tuple[int, int]) -> None:
    """Scaled while it is decoded, or decoded and then scaled by PIL: the same to rounding (swscale scales YUV)."""
    data = encoded(textured())
    box = (20, 10, 240, 200)
    with Video(data) as video:
        whole = video.clips([[0]])[0].frames[0].permute(1, 2, 0).numpy()
        scaled = video.clips([[0]], size=size)[0].frames[0].permute(1, 2, 0).numpy()
        cut = video.clips([[0]], [box], size)[0].frames[0].permute(1, 2, 0).numpy()
    picture = Image.fromarray(whole)
    for got, source in ((scaled, picture), (cut, picture.crop((20, 10, 260, 210)))):
        off = got.astype(float) - np.asarray(source.resize(size[::-1], Image.Resampling.BILINEAR))
        assert abs(off.mean()) < 0.1
        assert np.abs(off).mean() < 1


# -- real clips ----------------------------------------------------------------------------------------------------

DIFFERS = {  # damaged: how many frames come depends on what happens after the damage
    "fragmented_truncated.mp4",
    "truncated_faststart_half.mp4",
}
REFUSED = {"audio_plus_cover_art.mp4", "jpeg_named.mp4", "ffconcat_relative.mp4", "dimension_bomb_16384x8704.mp4"}


def _rows(folder: Path) -> list[tuple[Path, int]]:
    with open(folder / "index.csv", encoding="utf-8") as file:
        rows = [(folder / row["path"], int(row["frames_decoded"])) for row in csv.DictReader(file)]
    return [(path, frames) for path, frames in rows if "tennis7" not in path.parts]


def _check_against_full_decode(path: Path) -> None:
    with Video(path) as video:
        size = (48, 64)
        painted = [video.clips([[n]], None, size)[0].frames[0] for n in (0,)]
        assert painted[0].shape == (3, *size)
    expected = [rgb for rgb, _ in VideoReader(path)]
    draw = random.Random(str(path.name))
    wanted = [sorted(draw.choices(range(len(expected)), k=6)) for _ in range(3)]
    tails = [len(expected) - 1, 0]
    deep = any(depth in probe(path).pixel_format[6:] for depth in ("10", "12"))
    for known in (False, True):
        with Video(path, known=known) as video:
            for clip, numbers in zip(video.clips([*wanted, tails]), [*wanted, tails], strict=True):
                for got, number in zip(clip.frames, numbers, strict=True):
                    want = torch.from_numpy(expected[number].copy()).permute(2, 0, 1)
                    if got.shape == want.shape:
                        # Neighbours differ by more; deep colour is dithered and its chroma scaled in another way.
                        assert (got.float() - want.float()).abs().mean() < (4 if deep or path.suffix == ".ts" else 0.05)


@pytest.mark.slow
def test_real_clips_select_exact_frames(shared_data: Path) -> None:
    for path, frames in _rows(shared_data):
        if path.parent.name == "clips":
            assert probe(path, exact=True).frames == frames, path
            _check_against_full_decode(path)


def test_hostile_files_end_as_documented(shared_data: Path) -> None:
    for path, frames in _rows(shared_data):
        if "hostile" not in path.parts:
            continue
        if frames == 0 or path.name in REFUSED:
            with pytest.raises(DataError):
                probe(path, exact=True)
        elif path.name not in DIFFERS:
            assert probe(path, exact=True).frames == frames, path


@pytest.mark.slow
def test_hostile_files_select_exact_frames(shared_data: Path) -> None:
    for path, frames in _rows(shared_data):
        if "hostile" in path.parts and frames and path.name not in REFUSED | DIFFERS:
            _check_against_full_decode(path)


def test_no_module_here_needs_torch_to_probe() -> None:
    program = "import sys, diffmae_video.data.transcode, diffmae_video.data.decode; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0

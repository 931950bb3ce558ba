"""One pass over a split: the same clips as decoding each view alone, the same rows however it is run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmae_video.data.decode import Video
from diffmae_video.data.shards import ShardReader
from diffmae_video.errors import DataError
from diffmae_video.evaluation.classify import SplitViews, ViewSettings, decode_views, run_pass, videos_per_block
from diffmae_video.evaluation.records import PassStore
from diffmae_video.evaluation.views import crop_corner, parse_views, scaled_size

SETTINGS = ViewSettings(parse_views("1x1,3x3"), frames=4, stride=3, size=(32, 32))


def forward(clips: torch.Tensor) -> torch.Tensor:
    """A stand-in model: three numbers that depend on every pixel and on the order of frames."""
    x = clips.float() / 255  # (B, T, C, H, W)
    weight = torch.linspace(1, 2, x[0].numel()).view(x.shape[1:])
    return torch.stack([(x * weight).mean((1, 2, 3, 4)), x.std((1, 2, 3, 4)), x[:, 0].mean((1, 2, 3))], dim=1)


def test_views_equal_decoding_each_view_alone(tmp_path: Path, make_shards) -> None:
    manifest = make_shards(tmp_path, {"val": 1})
    data = ShardReader(manifest).read("val", 0).data
    decoded = decode_views(data, SETTINGS)
    assert decoded.needed == sorted(set(decoded.needed))
    for index, view in enumerate(decoded.plan.views):
        with Video(data) as video:  # opened anew, as one seek per view does
            size = scaled_size(36, 48, (32, 32))
            alone = video.clips([view.frames], size=size)[0].frames
        top, left = crop_corner(*size, (32, 32), view.place)
        assert torch.equal(decoded.view(index), alone[:, :, top : top + 32, left : left + 32])


def test_real_video_views_equal_decoding_each_view_alone(shared_data: Path) -> None:
    path = shared_data / "clips" / "k400_arm_wrestling_ehLnj7pXnYE.mp4"
    settings = ViewSettings(parse_views("3x3"), frames=8, stride=4, size=(64, 64))
    decoded = decode_views(path, settings)
    with Video(path) as video:
        size = scaled_size(video.info.height, video.info.width, (64, 64))
    for index, view in enumerate(decoded.plan.views):
        with Video(path) as video:
            alone = video.clips([view.frames], size=size)[0].frames
        top, left = crop_corner(*size, (64, 64), view.place)
        assert torch.equal(decoded.view(index), alone[:, :, top : top + 64, left : left + 64])


def test_images_are_one_frame_with_a_margin() -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, :64] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    decoded = decode_views(buffer.getvalue(), ViewSettings(parse_views("1x1"), 1, 4, (56, 56)))
    assert decoded.frames.shape == (1, 3, 64, 64)
    view = decoded.view(0)
    assert view.shape == (1, 3, 56, 56)
    assert view[0, 0, :, :27].float().mean() > 195
    assert view[0, 0, :, 29:].float().mean() < 5


def test_no_video_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        decode_views(b"#EXTM3U\nhttp://127.0.0.1/", SETTINGS)
    with pytest.raises(DataError, match="cannot be read"):
        decode_views(tmp_path / "none.mp4", SETTINGS)


def test_rows_do_not_depend_on_processes_or_interruption(tmp_path: Path, make_shards) -> None:
    manifest = make_shards(tmp_path / "data", {"val": 7}, broken=("val0003",))
    dataset = SplitViews(manifest, "val", SETTINGS, range(7), block=2)

    def collect(store: PassStore) -> tuple:
        samples, failed, _ = store.summary()
        return samples, {name: store.collect(name) for name in ("1x1", "3x3")}, failed

    whole = PassStore(tmp_path / "a", "f")
    counts = []
    run_pass(forward, dataset, whole, batch_views=4, advance=lambda videos, failed: counts.append((videos, failed)))
    samples, values, failed = collect(whole)
    assert samples == [0, 1, 2, 4, 5, 6]
    assert list(failed) == [3]
    assert "Not a video" in failed[3]
    assert counts == [(2, 0), (2, 1), (2, 0), (1, 0)]
    assert values["3x3"].shape == (6, 3)

    for rank in (0, 1):  # two processes
        run_pass(forward, dataset, PassStore(tmp_path / "b", "f", rank), batch_views=4, rank=rank, world=2)
    again = collect(PassStore(tmp_path / "b", "f"))
    assert again[0] == samples
    assert all(torch.equal(again[1][name], values[name]) for name in values)
    assert again[2] == failed

    calls = []

    def dies(clips: torch.Tensor) -> torch.Tensor:
        calls.append(len(clips))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(clips)

    store = PassStore(tmp_path / "c", "f")
    with pytest.raises(KeyboardInterrupt):
        run_pass(dies, dataset, store, batch_views=4)
    store.flush()
    assert 0 < len(store.done()) < 4
    run_pass(forward, dataset, PassStore(tmp_path / "c", "f"), batch_views=4)
    resumed = collect(PassStore(tmp_path / "c", "f"))
    assert resumed[0] == samples
    assert all(torch.equal(resumed[1][name], values[name]) for name in values)


def test_workers_give_the_same_rows(tmp_path: Path, make_shards) -> None:
    manifest = make_shards(tmp_path / "data", {"val": 3})
    dataset = SplitViews(manifest, "val", SETTINGS, range(3), block=1)
    for workers in (0, 1):
        run_pass(forward, dataset, PassStore(tmp_path / str(workers), "f"), batch_views=32, workers=workers)
    first, second = (PassStore(tmp_path / str(workers), "f").collect("3x3") for workers in (0, 1))
    assert torch.equal(first, second)


def test_mean_over_views_by_hand(tmp_path: Path, make_shards) -> None:
    manifest = make_shards(tmp_path / "data", {"val": 1})
    dataset = SplitViews(manifest, "val", SETTINGS, [0], block=1)
    store = PassStore(tmp_path / "s", "f")
    run_pass(forward, dataset, store, batch_views=5)
    decoded = dataset[0][1][0][1]
    clips = torch.stack([decoded.view(index) for index in range(len(decoded.plan.views))])
    expected = forward(clips)[list(decoded.plan.members[1])].mean(0)
    assert torch.allclose(store.collect("3x3")[0], expected, atol=1e-6)
    assert len(decoded.plan.members[1]) == 9


def test_block_size() -> None:
    assert videos_per_block(parse_views("7x3"), 16) == 1
    assert videos_per_block(parse_views("1x1"), 16) == 16

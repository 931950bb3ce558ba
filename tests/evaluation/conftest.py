"""Small sharded data sets, made with the package's own writer."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from diffmae_video.data.manifest import Manifest, ShardInfo, write_manifest
from diffmae_video.data.shards import TarShard
from diffmae_video.files import sha256_of


def encode(frames: np.ndarray, gop: int = 8) -> bytes:
    """H.264 in MP4 of frames uint8 (T, H, W, 3): the same bytes for the same frames, as tests write them twice."""
    options = {"g": str(gop), "bf": "0", "crf": "12", "x264-params": "mbtree=0"}  # the tree reads leftovers in memory
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def moving_square(label: int, seed: int, frames: int = 24, height: int = 36, width: int = 48) -> np.ndarray:
    """A bright square that moves right (0), left (1) or down (2) over dim noise, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 60, (1, height, width, 3), dtype=np.uint8), frames, axis=0)
    row, column = rng.integers(4, 14), rng.integers(4, 14)
    for index in range(frames):
        step = index * 20 // frames
        top = row + (step if label == 2 else 0)
        left = column + (step if label == 0 else 20 - step if label == 1 else 0)
        video[index, top : top + 8, left : left + 8] = 230
    return video


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Manifest]:
    """Write a sharded data set of moving squares; `broken` keys hold bytes that are no video."""

    def make(
        root: Path,
        splits: dict[str, int] | None = None,
        *,
        dataset: str = "squares",
        classes: tuple[str, ...] = ("right", "left", "down"),
        broken: tuple[str, ...] = (),
        frames: int = 24,
    ) -> Manifest:
        root.mkdir(parents=True, exist_ok=True)
        shards = []
        for split, count in (splits or {"train": 12, "val": 9}).items():
            name = f"{split}-000000.tar"
            with open(root / name, "wb") as file:
                tar = TarShard(file)
                for index in range(count):
                    label, key = index % len(classes), f"{split}{index:04d}"
                    data = encode(moving_square(label % 3, index + 1000 * len(split), frames))
                    if key in broken:
                        data = b"not a video at all"
                    facts = {"label": label, "frames": frames, "fps": 25.0, "width": 48, "height": 36}
                    tar.add(key, "mp4", data, facts)
                tar.close()
            info = ShardInfo(name, split, (root / name).stat().st_size, sha256_of(root / name), count)
            shards.append((info, tar.rows))
        return write_manifest(root, dataset=dataset, kind="video", classes=list(classes), shards=shards)

    return make

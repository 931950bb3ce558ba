"""Order, resume and elasticity of the stream; what a batch holds."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from diffmae_video.config import Settings, with_overrides
from diffmae_video.data.manifest import MANIFEST, Manifest, ShardInfo, write_manifest
from diffmae_video.data.order import clip_seeds, epoch_order, label_subset
from diffmae_video.data.shards import TarShard
from diffmae_video.data.stream import build_stream
from diffmae_video.errors import DataError, UsageError

from .clips import make_video, read_number

CONFIGURATIONS = [(1, 0), (1, 2), (2, 0), (2, 2), (3, 1)]


def write_shards(
    root: Path, samples: int = 26, per_shard: int = 5, bad: tuple[int, ...] = (), kind: str = "video"
) -> Path:
    """Shards of numbered clips; those in `bad` hold text."""
    root.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, samples, per_shard)):
        name = f"train-{number:06d}.tar"
        with open(root / name, "wb") as file:
            tar = TarShard(file)
            for index in range(first, min(first + per_shard, samples)):
                data = b"no video" if index in bad else _media(kind, index)
                meta = {
                    "label": index % 2,
                    "frames": 6 if kind == "video" else 1,
                    "fps": 10.0,
                    "width": 64,
                    "height": 48,
                }
                tar.add(f"s{index:03d}", "mp4" if kind == "video" else "png", data, meta)
            tar.close()
        raw = (root / name).read_bytes()
        import hashlib

        shards.append((ShardInfo(name, "train", len(raw), hashlib.sha256(raw).hexdigest(), len(tar.rows)), tar.rows))
    write_manifest(root, dataset="test", kind=kind, classes=["even", "odd"], shards=shards)
    return root


def _media(kind: str, index: int) -> bytes:
    if kind == "video":
        return make_video(frames=6, first=index)
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def settings(path: Path, **data: object) -> Settings:
    data = {"path": str(path), "workers": 0, "stride": 1, "shuffle_block": 2, **data}
    return with_overrides(Settings(), data=data, model={"frames": 2, "size": (32, 32)})


def global_batches(
    path: Path, count: int, world: int = 1, batch: int = 6, state: dict | None = None, **data: object
) -> list:
    """The first global batches: (keys, one number per clip that depends on its pixels, seeds)."""
    ranks = []
    for rank in range(world):
        with build_stream(
            settings(path, **data), split="train", batch_size=batch // world, training=True, rank=rank, world=world
        ) as stream:
            if state:
                stream.load_state_dict(state)
            ranks.append(
                [
                    (b.keys, b.clips.double().mean((1, 2, 3, 4)).tolist(), b.seeds.tolist())
                    for b in itertools.islice(stream, count)
                ]
            )
    return [tuple([x for rank in ranks for x in rank[i][part]] for part in range(3)) for i in range(count)]


@pytest.mark.parametrize(("world", "workers"), CONFIGURATIONS[1:])
def test_same_order_and_pixels_for_any_world_and_workers(shards: Path, world: int, workers: int) -> None:
    assert global_batches(shards, 6, world, workers=workers) == global_batches(shards, 6)


def test_each_epoch_holds_every_sample_once(shards: Path) -> None:
    keys = [key for batch in global_batches(shards, 13, batch=4) for key in batch[0]]
    first, second = keys[:26], keys[26:52]
    assert sorted(first) == sorted(second) == [f"s{i:03d}" for i in range(26)]
    assert first != second


@pytest.mark.parametrize("after", [1, 4, 5])  # 26 samples, 6 a batch: the fifth batch crosses the epoch
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_anywhere(shards: Path, after: int, workers: int) -> None:
    whole = global_batches(shards, after + 3)
    with build_stream(settings(shards, workers=workers), split="train", batch_size=6, training=True) as stream:
        for _ in itertools.islice(stream, after):
            pass
        state = json.loads(json.dumps(stream.state_dict()))
    assert global_batches(shards, 3, state=state, workers=2 - workers) == whole[after:]


def test_world_size_changes_mid_epoch(shards: Path) -> None:
    seen, state = [], None
    for world, count in ((1, 1), (2, 1), (3, 2), (1, 3)):  # 6 samples a global batch, 42 in all
        seen += [key for batch in global_batches(shards, count, world, state=state) for key in batch[0]]
        consumed = len(seen)
        state = {"epoch": consumed // 26, "consumed": consumed % 26}
    assert sorted(seen[:26]) == [f"s{i:03d}" for i in range(26)]
    assert seen == [key for batch in global_batches(shards, 7) for key in batch[0]]


def test_state_loaded_after_the_iterator_exists(shards: Path) -> None:
    with build_stream(settings(shards), split="train", batch_size=6, training=True) as stream:
        old = iter(stream)
        first = next(old).keys
        stream.load_state_dict({"epoch": 0, "consumed": 0})
        with pytest.raises(RuntimeError, match="iter"):
            next(old)
        assert next(iter(stream)).keys == first


def test_state_of_other_data_is_refused(shards: Path) -> None:
    stream = build_stream(settings(shards), split="train", batch_size=2, training=True)
    with pytest.raises(UsageError, match="other shards"):
        stream.load_state_dict({"epoch": 0, "consumed": 0, "manifest": "0" * 64})


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_sample_once_in_order(shards: Path, world: int) -> None:
    found = []
    for rank in range(world):
        with build_stream(
            settings(shards), split="train", batch_size=4, training=False, rank=rank, world=world
        ) as stream:
            found += [(batch.position, rank, batch.samples.tolist()) for batch in stream]
    assert [sample for _, _, samples in sorted(found) for sample in samples] == list(range(26))


def test_repeats_share_a_video_and_differ(shards: Path) -> None:
    with build_stream(settings(shards, repeats=3), split="train", batch_size=6, training=True) as stream:
        batch = next(iter(stream))
    assert batch.keys[0] == batch.keys[1] == batch.keys[2] != batch.keys[3]
    assert len(set(batch.seeds.tolist())) == 6
    assert not torch.equal(batch.clips[0], batch.clips[1])
    assert stream.position == 2


def test_batch_fields(shards: Path) -> None:
    with build_stream(settings(shards, flip=0.0), split="train", batch_size=4, training=True) as stream:
        batch = next(iter(stream))
    assert batch.clips.shape == (4, 2, 3, 32, 32)
    assert batch.clips.dtype == torch.uint8
    assert batch.labels.tolist() == [int(key[1:]) % 2 for key in batch.keys]
    assert batch.samples.tolist() == [int(key[1:]) for key in batch.keys]
    assert batch.seeds.tolist() == clip_seeds(0, 0, batch.samples.numpy(), 0).tolist()


def test_test_clips_come_from_the_middle(shards: Path) -> None:
    with build_stream(settings(shards), split="train", batch_size=1, training=False) as stream:
        clip = next(iter(stream)).clips[0]
    assert [read_number(frame.permute(1, 2, 0).numpy()) & 7 for frame in clip]  # decodes
    assert clip.shape == (2, 3, 32, 32)


def test_unreadable_samples_are_replaced_and_counted(tmp_path: Path) -> None:
    path = write_shards(tmp_path, bad=(3,))
    with build_stream(settings(path, max_bad_fraction=0.5), split="train", batch_size=13, training=True) as stream:
        batches = list(itertools.islice(stream, 4))
    assert all(len(batch.keys) == 13 for batch in batches)
    assert all("s003" not in batch.keys for batch in batches)
    assert stream.bad == {"unreadable": 2}
    again = global_batches(path, 4, batch=13, max_bad_fraction=0.5, workers=2)
    assert [batch[0] for batch in again] == [batch.keys for batch in batches]


def test_mostly_unreadable_data_ends_the_run(tmp_path: Path) -> None:
    path = write_shards(tmp_path, samples=12, bad=tuple(range(12)))
    stream = build_stream(settings(path), split="train", batch_size=4, training=True)
    with pytest.raises(DataError, match="verify"):
        next(iter(stream))


def test_workers_leave_with_the_stream(shards: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    stream = build_stream(settings(shards, workers=2), split="train", batch_size=2, training=True)
    next(iter(stream))
    started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert len(started) >= 2
    stream.close()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_closed_streams_leave_no_files_open(shards: Path) -> None:
    before = psutil.Process().num_fds()
    for _ in range(3):
        with build_stream(settings(shards), split="train", batch_size=6, training=True) as stream:
            first = next(iter(stream)).keys
            stream.load_state_dict({"epoch": 0, "consumed": 0})
            assert next(iter(stream)).keys == first
    assert psutil.Process().num_fds() == before


def test_wrong_requests(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split"):
        build_stream(settings(shards), split="val", batch_size=2, training=True)
    with pytest.raises(UsageError, match="repeats"):
        build_stream(settings(shards, repeats=3), split="train", batch_size=4, training=True)
    with pytest.raises(DataError, match="diffmae shard"):
        build_stream(settings(tmp_path), split="train", batch_size=4, training=True)


# -- order ---------------------------------------------------------------------------------------------------------


def test_epoch_order_is_a_permutation_and_mixes_like_a_full_shuffle() -> None:
    shards = np.repeat(np.arange(64), 100)
    order = epoch_order(shards, seed=1, epoch=0, block=16)
    assert sorted(order.tolist()) == list(range(6400))
    assert order.tolist() == epoch_order(shards, seed=1, epoch=0, block=16).tolist()
    assert order.tolist() != epoch_order(shards, seed=1, epoch=1, block=16).tolist()
    full = epoch_order(shards, seed=1, epoch=0, block=64)
    travel = [np.abs(np.argsort(one) - np.arange(6400)).mean() / 6400 for one in (order, full)]
    assert travel[1] == pytest.approx(1 / 3, abs=0.02)  # mean distance of two uniform places
    assert travel[0] > 0.25
    spread = [np.mean([len(set(shards[batch])) for batch in one.reshape(-1, 64)]) for one in (order, full)]
    assert spread[0] > 0.9 * 16 * (1 - (1 - 1 / 16) ** 64)  # as many shards in a batch as 16 can give


def test_batches_mix_classes_like_a_full_shuffle() -> None:
    """`diffmae shard` deals classes over shards by hash; then a block of shards holds them as the whole set does."""
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(25_600) % 40)
    shards = np.arange(25_600) // 128
    order = epoch_order(shards, seed=0, epoch=0, block=16)
    mixes = []
    for one in (order, draw.permutation(25_600)):
        batches = labels[one].reshape(-1, 64)
        mixes.append(
            [np.mean([len(set(batch)) for batch in batches]), np.var([np.bincount(b, minlength=40) for b in batches])]
        )
    assert mixes[0] == pytest.approx(mixes[1], rel=0.02)
    assert mixes[0][0] == pytest.approx(40 * (1 - (39 / 40) ** 64), rel=0.02)


def test_label_subset_is_stratified_and_nested_by_seed() -> None:
    labels = np.asarray([0] * 50 + [1] * 30 + [-1] * 20)
    chosen = label_subset(labels, 0.1, 0, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [5, 3]
    assert set(chosen) <= set(label_subset(labels, 0.2, 0, seed=3))
    few = label_subset(labels, 1.0, 7, seed=3)
    assert np.bincount(labels[few]).tolist() == [7, 7]
    assert set(chosen[:5]) <= set(few)
    assert np.bincount(labels[label_subset(labels, 0.2, 7, seed=3)]).tolist() == [7, 6]
    assert label_subset(labels, 1.0, 0, seed=3) is None


@pytest.mark.slow
def test_ten_million_samples(tmp_path: Path) -> None:
    count, shards = 10_000_000, 10_000
    import hashlib
    import io

    import pyarrow
    import pyarrow.parquet as parquet

    numbers = np.arange(count)
    table = {"key": pyarrow.array(np.char.add("k", numbers.astype(str)), pyarrow.large_string())}
    table |= {
        "shard": (numbers // 1000).astype(np.int32),
        "offset": numbers % 1000 * 10_000,
        "size": np.full(count, 9000),
        "meta_offset": numbers % 1000 * 10_000 + 9500,
        "meta_size": np.full(count, 100, np.int32),
        "suffix": np.zeros(count, np.int8),
        "label": (numbers % 400).astype(np.int32),
        "frames": np.full(count, 300, np.int32),
        "fps": np.full(count, 30, np.float32),
        "width": np.full(count, 340, np.int32),
        "height": np.full(count, 256, np.int32),
        "crc": np.zeros(count, np.uint32),
    }
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(table), buffer, compression="zstd")
    raw = buffer.getvalue()
    (tmp_path / "samples.parquet").write_bytes(raw)
    body = {
        "format": 1, "dataset": "big", "kind": "video", "classes": [str(i) for i in range(400)], "suffixes": ["mp4"],
        "splits": {"train": count}, "hash": "x", "table": {"sha256": hashlib.sha256(raw).hexdigest()},
        "shards": [
            {"name": f"t-{i}.tar", "split": "train", "bytes": 10**7, "sha256": "", "samples": 1000}
            for i in range(shards)
        ],
    }  # fmt: skip
    told = [body["table"]["sha256"], body["shards"], body["classes"], body["splits"]]
    body["hash"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    program = (
        "import sys, time, psutil\n"
        "from diffmae_video.data.manifest import Manifest\n"
        "from diffmae_video.data.order import epoch_order\n"
        "import pyarrow.parquet\n"
        "base = psutil.Process().memory_info().rss\n"
        "begun = time.process_time(); table = Manifest.load(sys.argv[1]).samples('train')\n"
        "seconds = time.process_time() - begun\n"
        "import os\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    import random\n"
        "    for _ in range(20000): i = random.randrange(len(table)); table.key(i), int(table.offset[i])\n"
        "    print(len(table), seconds, psutil.Process().memory_full_info().uss >> 20, flush=True); os._exit(0)\n"
        "os.wait()\n"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    length, seconds, own = done.stdout.split()
    assert int(length) == count
    assert float(seconds) < 60
    assert int(own) < 200  # MiB that the worker does not share with its parent


def test_manifest_refuses_names_that_leave_the_folder(shards: Path, tmp_path: Path) -> None:
    for name in ("../x.tar", "/etc/x.tar", "pipe:touch x.tar", "a\\b.tar"):
        body = json.loads((shards / MANIFEST).read_text())
        body["shards"][0]["name"] = name
        (tmp_path / MANIFEST).write_text(json.dumps(body))
        with pytest.raises(DataError, match="no plain"):
            Manifest.load(tmp_path)
    with pytest.raises(UsageError, match="pipe"):
        Manifest.load("pipe:cat x")
    assert not os.path.exists("x.tar")


@pytest.mark.slow
def test_workers_may_start_afresh(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes are not copies of their parent (macOS, Windows) batches are the same."""
    monkeypatch.setattr("diffmae_video.data.stream._START", "spawn")
    assert global_batches(shards, 3, workers=1) == global_batches(shards, 3)

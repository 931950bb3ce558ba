"""What a folder of shards says of itself is checked before it is used: names, hashes, counts, columns, copies."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from diffmae_video.data.cache import ShardCache
from diffmae_video.data.manifest import MANIFEST, TABLE, Manifest, ShardInfo, write_manifest
from diffmae_video.data.shards import ShardReader, TarShard
from diffmae_video.errors import DataError

from .clips import make_video


def make(root: Path, names: tuple[str, ...] = ("train-0.tar", "val-0.tar")) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    shards = []
    for place, name in enumerate(names):
        sink = io.BytesIO()
        tar = TarShard(sink)
        for number in range(2):
            tar.add(f"s{number}", "mp4", make_video(frames=3, first=number), {"label": place, "frames": 3, "fps": 10.0})
        tar.close()
        (root / name).write_bytes(sink.getvalue())
        digest = hashlib.sha256(sink.getvalue()).hexdigest()
        shards.append((ShardInfo(name, name.partition("-")[0], len(sink.getvalue()), digest, 2), tar.rows))
    write_manifest(root, dataset="test", kind="video", classes=["a", "b"], shards=shards)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shards"))


def edited(folder: Path, root: Path, change: Callable[[dict[str, Any]], Any], honest: bool) -> Path:
    """A copy with another manifest; `honest` ones have the hash of what they say."""
    root.mkdir()
    for path in folder.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    body = json.loads((root / MANIFEST).read_text())
    change(body)
    if honest:
        told = [body["table"]["sha256"], body["shards"], body["classes"], body["splits"]]
        body["hash"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    (root / MANIFEST).write_text(json.dumps(body))
    return root


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["classes"].reverse(),
        lambda body: body["shards"].reverse(),
        lambda body: body["shards"][0].update(sha256="0" * 64),
        lambda body: body.update(splits={"train": 4}),
    ],
)
def test_a_manifest_that_was_changed_is_refused(folder: Path, tmp_path: Path, change: Callable) -> None:
    with pytest.raises(DataError, match="was changed"):
        Manifest.load(edited(folder, tmp_path / "x", change, honest=False))


@pytest.mark.parametrize(
    ("splits", "wanted", "found"),
    [
        (("train", "val", "test"), "val", "val"),
        (("train", "test"), "val", "test"),
        (("train", "test"), "dev", "dev"),
        (("train", "val"), "test", "test"),
        (("train",), "val", "val"),
    ],
)
def test_the_split_to_test_on(tmp_path: Path, splits: tuple[str, ...], wanted: str, found: str) -> None:
    shards = Manifest.load(make(tmp_path, tuple(f"{split}-0.tar" for split in splits)))
    assert shards.held_out(wanted) == found


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "..", ".hidden", "", "a\nb", "a b", "\x1b[31m", 5])
def test_splits_are_plain_names(folder: Path, tmp_path: Path, name: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["splits"] = {str(name): 2, "val": 2}
        body["shards"][0]["split"] = name

    with pytest.raises(DataError, match="no plain name"):
        Manifest.load(edited(folder, tmp_path / "x", change, honest=True))


@pytest.mark.parametrize("name", ["../train.tar", "/train.tar", "a\\b.tar", "pipe:train.tar", "train.mp4", "a\nb.tar"])
def test_shards_lie_in_their_folder(folder: Path, tmp_path: Path, name: str) -> None:
    def change(body: dict[str, Any]) -> None:
        body["shards"][0]["name"] = name

    with pytest.raises(DataError, match=r"plain \.tar"):
        Manifest.load(edited(folder, tmp_path / "x", change, honest=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(splits={"train": -2, "val": 6}),
        lambda body: body.update(splits={"train": 2.0, "val": 2}),
        lambda body: body.update(splits=[]),
        lambda body: body.update(classes=[1, 2]),
        lambda body: body.update(classes=5),
        lambda body: body.update(kind="model"),
        lambda body: body.update(table={}),
        lambda body: body["shards"][0].update(bytes="many"),
        lambda body: body["shards"][0].update(more=1),
    ],
)
def test_odd_values_are_one_sentence(folder: Path, tmp_path: Path, change: Callable) -> None:
    root = edited(folder, tmp_path / "x", change, honest=False)
    with pytest.raises(DataError):
        Manifest.load(root)


def test_deep_json_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    root = edited(folder, tmp_path / "x", lambda body: None, honest=False)
    (root / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.load(root)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", [0, 0, 7, 1]),
        ("label", [0, 0, -5, 1]),
        ("offset", [-1, 0, 0, 0]),
        ("size", [0, 0, 0, -1]),
        ("fps", [float("nan")] * 4),
        ("frames", ["a", "b", "c", "d"]),
        ("suffix", [None, 0, 0, 0]),
    ],
)
def test_odd_columns_are_one_sentence(folder: Path, tmp_path: Path, column: str, values: list[Any]) -> None:
    table = parquet.read_table(folder / TABLE)
    table = table.set_column(table.column_names.index(column), column, pyarrow.array(values))
    sink = io.BytesIO()
    parquet.write_table(table, sink)

    def change(body: dict[str, Any]) -> None:
        body["table"]["sha256"] = hashlib.sha256(sink.getvalue()).hexdigest()

    root = edited(folder, tmp_path / "x", change, honest=True)
    (root / TABLE).write_bytes(sink.getvalue())
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(root).samples("train")


def test_a_sample_beyond_its_shard_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    table = parquet.read_table(folder / TABLE)
    table = table.set_column(table.column_names.index("size"), "size", pyarrow.array([3 << 30] * 4))
    sink = io.BytesIO()
    parquet.write_table(table, sink)

    def change(body: dict[str, Any]) -> None:
        body["table"]["sha256"] = hashlib.sha256(sink.getvalue()).hexdigest()

    root = edited(folder, tmp_path / "x", change, honest=True)
    (root / TABLE).write_bytes(sink.getvalue())
    with ShardReader(Manifest.load(root)) as reader, pytest.raises(DataError, match="ends before"):
        reader.read("train", 0)


def test_a_cached_shard_is_checked_by_content(folder: Path, tmp_path: Path) -> None:
    """The same size with other bytes is fetched again; an untouched copy is not even read again."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(folder), "/checked", recursive=True)
    manifest = Manifest.load("memory://checked")
    path = Path(ShardCache(manifest, str(tmp_path)).fetch(0))
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert Path(ShardCache(manifest, str(tmp_path)).fetch(0)).read_bytes() == whole
    before = path.stat().st_mtime_ns
    files.rm("/checked/train-0.tar")
    assert Path(ShardCache(manifest, str(tmp_path)).fetch(0)).stat().st_mtime_ns == before

"""Shards on an S3-protocol server on loopback, which fails, stalls and cuts answers now and then."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmae_video.config import Settings, with_overrides
from diffmae_video.data import remote
from diffmae_video.data.cache import ShardCache
from diffmae_video.data.manifest import Manifest
from diffmae_video.data.shards import ShardReader
from diffmae_video.data.stream import build_stream
from diffmae_video.errors import DataError, StorageError
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.pipelines.verify import verify

from ..data.clips import make_folders

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


class Flaky:
    """A WSGI application that answers 500 to every fifth read and serves every seventh late."""

    def __init__(self, inner: Any):
        self.inner, self.reads, self.failed = inner, 0, 0
        self.pause = threading.Event()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET":
            self.reads += 1
            if self.reads % 5 == 0:
                self.failed += 1
                start("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            if self.reads % 7 == 0:
                self.pause.wait(0.3)
        return self.inner(environ, start)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Flaky]]:
    from werkzeug.serving import make_server

    application = Flaky(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**values, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield "s3://bucket", application
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()


@pytest.mark.slow
def test_shard_verify_and_stream_through_s3(bucket: tuple[str, Flaky], tmp_path: Path) -> None:
    url, application = bucket
    source = make_folders(tmp_path / "source")
    files, _ = remote.filesystem(url)
    files.put(str(source), "bucket/source", recursive=True)
    result = shard(ShardJob(f"{url}/source", f"{url}/shards", samples_per_shard=3, workers=2))
    assert result.written == 12
    assert shard(ShardJob(f"{url}/source", f"{url}/shards", samples_per_shard=3)).unchanged
    shard(ShardJob(source, tmp_path / "local", samples_per_shard=3))
    names = [path.name for path in (tmp_path / "local").glob("*.tar")]
    assert names
    for name in names:
        assert remote.read_file(f"{url}/shards/{name}") == (tmp_path / "local" / name).read_bytes()
    assert application.failed

    data = {
        "path": f"{url}/shards",
        "workers": 0,
        "stride": 1,
        "cache_dir": str(tmp_path / "cache"),
        "shuffle_block": 1,
    }
    keys = []
    for path in (f"{url}/shards", str(tmp_path / "local")):
        settings = with_overrides(Settings(), data=data | {"path": path}, model={"frames": 2, "size": (32, 32)})
        with build_stream(settings, split="train", batch_size=4, training=True) as stream:
            keys.append([batch.keys for batch in itertools.islice(stream, 4)])
    assert keys[0] == keys[1]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3


def test_cache_is_bounded_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    source = make_folders(tmp_path / "source")
    shard(ShardJob(source, tmp_path / "local", samples_per_shard=3))
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path / "local"), "/shards", recursive=True)
    manifest = Manifest.load("memory://shards")
    biggest = max(info.bytes for info in manifest.shards)
    cache = ShardCache(manifest, str(tmp_path / "cache"), gib=2.2 * biggest / 2**30)
    paths = [Path(cache.fetch(number)) for number in range(len(manifest.shards))]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 2.2 * biggest
    assert paths[-1].exists()
    assert not paths[0].exists()
    paths[-1].write_bytes(b"cut")  # another size than the manifest says: fetched again
    assert Path(cache.fetch(len(paths) - 1)).stat().st_size == manifest.shards[-1].bytes

    real, cuts = type(files).get_file, [2]

    def cut(self: Any, inner: str, target: str, **options: Any) -> None:
        real(self, inner, target, **options)
        if cuts[0] > 0:
            cuts[0] -= 1
            Path(target).write_bytes(Path(target).read_bytes()[:-1])

    monkeypatch.setattr(type(files), "get_file", cut)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    assert Path(cache.fetch(0)).stat().st_size == manifest.shards[0].bytes
    cuts[0] = 99
    with pytest.raises(DataError, match=r"Downloading .*train-000001.tar failed 4 times"):
        cache.fetch(1)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    cuts[0] = 0
    with ShardReader(manifest, str(tmp_path / "cache")) as reader:
        assert reader.read("val", 0).data
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert not verify("memory://shards").problems


def test_listing_outlives_an_outage_and_says_when_the_store_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    source, out = make_folders(tmp_path / "source"), "memory://outage/shards"
    shard(ShardJob(source, out, samples_per_shard=3, workers=1))
    store = type(fsspec.filesystem("memory"))
    real, failures = store.find, [0]

    def find(self: Any, *arguments: Any, **options: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise OSError("503 Slow Down")
        return real(self, *arguments, **options)

    monkeypatch.setattr(store, "find", find)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    failures[0] = 3
    assert not verify(out).problems
    failures[0] = 3
    assert shard(ShardJob(source, out, samples_per_shard=3, workers=1)).unchanged
    failures[0] = 99
    with pytest.raises(StorageError, match="Listing memory://outage/shards failed 4 times"):
        shard(ShardJob(source, out, samples_per_shard=3, workers=1))
    failures[0] = 0
    again = shard(ShardJob(source, out, samples_per_shard=2, workers=1, overwrite=True))  # what was there is removed
    assert not again.unchanged
    assert not verify(out).problems

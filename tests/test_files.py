"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import os

import pytest

from diffmae_video import files
from diffmae_video.files import replacing, sha256_of, write_atomic


def names(folder) -> list[str]:
    """What lies in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "wanted"), [("Größe\n", "Größe\n".encode()), (b"\0\xff", b"\0\xff")])
def test_text_and_bytes_are_written_over_what_was_there(tmp_path, content, wanted):
    file = tmp_path / "note.json"
    file.write_bytes(b"a much longer text than the new one")
    write_atomic(file, content)
    assert file.read_bytes() == wanted
    assert names(tmp_path) == ["note.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "table.parquet"
    file.write_text("old")

    def fail_half_way() -> None:
        with replacing(file) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert file.read_text() == "old"
    assert names(tmp_path) == ["table.parquet"]
    with pytest.raises(FileNotFoundError), replacing(file):
        pass  # a block that writes nothing must not pass for one that did
    assert file.read_text() == "old"


def test_until_the_block_ends_readers_see_the_old_file(tmp_path):
    file = tmp_path / "state"
    write_atomic(file, "old")
    with replacing(str(file)) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert temporary.name.startswith(".state.")  # hidden, and known as ours by its ending
        assert temporary.suffix == ".tmp"
    assert file.read_text() == "new"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order: list[str] = []
    plain_sync, plain_replace = files.sync_path, os.replace

    def sync(path):
        order.append(f"sync {path.read_text()}")
        plain_sync(path)

    monkeypatch.setattr(files, "sync_path", sync)
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), plain_replace(*names)))
    write_atomic(tmp_path / "a", "whole")
    assert order == ["sync whole", "rename"]


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files, "sync_path", full)
    with pytest.raises(OSError, match=os.strerror(28)):
        write_atomic(tmp_path / "a", "text")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 23) + 5])  # around the blocks it reads
def test_checksum_is_of_the_whole_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "shard.tar").write_bytes(content[:size])
    assert sha256_of(tmp_path / "shard.tar") == hashlib.sha256(content[:size]).hexdigest()

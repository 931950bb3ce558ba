"""The store of a long pass: order, interruption, damage and several writers."""

from __future__ import annotations

from pathlib import Path

import torch

from diffmae_video.evaluation import records
from diffmae_video.evaluation.records import PassStore


def rows_of(*samples: int) -> dict[int, dict[str, torch.Tensor]]:
    return {sample: {"a": torch.tensor([sample, 1.0]), "b": torch.tensor(sample * 2.0)} for sample in samples}


def test_collects_in_sample_order_over_writers(tmp_path: Path) -> None:
    first, second = PassStore(tmp_path, "f", rank=0), PassStore(tmp_path, "f", rank=1)
    second.add(1, rows_of(2, 3), {})
    first.add(0, rows_of(0), {1: "cut short"})
    first.flush(), second.flush()
    samples, failed, seconds = first.summary()
    assert samples == [0, 2, 3]
    assert first.collect("a").tolist() == [[0, 1], [2, 1], [3, 1]]
    assert first.collect("b").tolist() == [0, 4, 6]
    assert [rows.shape for _, rows in first.rows("a")] == [(1, 2), (2, 2)]
    assert failed == {1: "cut short"}
    assert seconds >= 0
    assert first.done() == {0, 1}


def test_only_flushed_blocks_are_done_after_a_kill(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(records, "FLUSH_SAMPLES", 2)
    store = PassStore(tmp_path, "f")
    store.add(0, rows_of(0, 1), {})
    store.add(1, rows_of(2), {})  # pending, lost with the process
    again = PassStore(tmp_path, "f")
    assert again.done() == {0}
    again.add(1, rows_of(2), {})
    again.flush()
    assert again.summary()[0] == [0, 1, 2]


def test_other_work_has_other_parts_and_remove_cleans_up(tmp_path: Path) -> None:
    store = PassStore(tmp_path, "one")
    store.add(0, rows_of(0), {})
    store.flush()
    assert PassStore(tmp_path, "two").done() == set()
    store.remove()
    assert not store.folder.exists()


def test_damaged_parts_are_computed_again(tmp_path: Path) -> None:
    store = PassStore(tmp_path, "f")
    store.add(0, rows_of(0), {})
    store.flush()
    store.add(1, {}, {1: "no video stream"})
    store.flush()
    part = sorted(store.folder.glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-3])
    assert PassStore(tmp_path, "f").done() == {1}
    assert store.summary()[:2] == ([], {1: "no video stream"})
    assert store.collect("a").numel() == 0


def test_a_block_computed_twice_counts_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        store = PassStore(tmp_path, "f", rank=rank)
        store.add(0, rows_of(0, 1), {})
        store.flush()
    assert store.summary()[0] == [0, 1]

"""`compare` on hand-made predictions, through the files that `eval` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.predictions import Predictions, class_difference, read_predictions, write_predictions
from diffmae_video.pipelines.compare import compare_evaluations, verdict

CLASSES = ["clap", "run", "wave"]


def save(folder: Path, labels: list[int], predicted: list[int], **changes) -> Path:
    folder.mkdir()
    probabilities = torch.full((len(labels), 3), 0.1)
    probabilities[torch.arange(len(labels)), torch.tensor(predicted)] = 0.8
    values = {
        "keys": [f"v{index}" for index in range(len(labels))],
        "labels": torch.tensor(labels),
        "classes": CLASSES,
        "probabilities": {"1x1": probabilities.flip(1), "5x3": probabilities},
    }
    write_predictions(folder / "predictions.parquet", Predictions(**(values | changes)))
    return folder


def test_predictions_survive_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", [0, 1, 2, 2], [0, 1, 1, 2])
    back = read_predictions(folder)
    assert back.keys == ["v0", "v1", "v2", "v3"]
    assert back.classes == CLASSES
    assert list(back.probabilities) == ["1x1", "5x3"]
    assert torch.equal(back.probabilities["1x1"].flip(1), back.probabilities["5x3"])
    assert back.probabilities["5x3"].argmax(1).tolist() == [0, 1, 1, 2]


def test_counts_and_classes(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 0])
    b = save(tmp_path / "b", [0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 2, 2])
    result = compare_evaluations(a, b, out=tmp_path / "c")
    assert (result.test.only_a, result.test.only_b, result.test.both, result.test.neither) == (1, 3, 2, 0)
    assert result.top1_a == pytest.approx(0.5)
    assert result.top1_b == pytest.approx(5 / 6)
    assert result.classes[0].name == "wave"
    assert result.classes[0].b - result.classes[0].a == 1
    assert result.test.p_value == pytest.approx(0.625)
    written = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert written["test"]["only_b"] == 3
    assert "+33.33 points" in verdict(result)
    assert "wave" in (tmp_path / "c" / "report.html").read_text()


def test_rows_are_matched_by_key(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [0, 1, 2], [0, 1, 0])
    b = save(tmp_path / "b", [2, 1, 0], [0, 1, 0], keys=["v2", "v1", "v0"])
    result = compare_evaluations(a, b)
    assert (result.test.only_a, result.test.only_b) == (0, 0)


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a", [0, 1, 2], [0, 1, 0])
    other_keys = save(tmp_path / "b", [0, 1, 2], [0, 1, 0], keys=["v0", "v1", "w9"])
    with pytest.raises(DataError, match="v2 is only in the first"):
        compare_evaluations(a, other_keys)
    assert compare_evaluations(a, other_keys, common=True).test.videos == 2
    other_classes = save(tmp_path / "c", [0, 1, 2], [0, 1, 0], classes=["clap", "sit", "wave"])
    with pytest.raises(DataError, match="class 1 is 'run' in the first"):
        compare_evaluations(a, other_classes)
    other_labels = save(tmp_path / "d", [0, 2, 2], [0, 1, 0])
    with pytest.raises(DataError, match="v1 different labels"):
        compare_evaluations(a, other_labels)
    with pytest.raises(UsageError, match="1x1, 5x3"):
        compare_evaluations(a, a, views="7x3")


def test_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no predictions"):
        read_predictions(tmp_path)
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a predictions file"):
        read_predictions(tmp_path)


def test_class_difference_names_the_first() -> None:
    assert class_difference(CLASSES, CLASSES) is None
    assert "class 0 is 'clap'" in class_difference(CLASSES, CLASSES[::-1])
    assert "class 2 is 'wave' in the first (3 classes) and 'missing' in the second (2 classes)" in class_difference(
        CLASSES, CLASSES[:2]
    )

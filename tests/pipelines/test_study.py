"""`diffmae study`: figures of its table, its data and its Slurm script."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from diffmae_video.config.study import Study, expand
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.predictions import FILE, Predictions, write_predictions
from diffmae_video.pipelines.study import STUDY_FILE, find_shards, study_command, write_slurm
from diffmae_video.pipelines.study_table import study_table

STUDY = Study.model_validate(
    {
        "name": "s",
        "summary": "",
        "recipe": "smoke",
        "data": ["demo"],
        "baseline": "scratch",
        "seeds": [0, 1],
        "arms": [{"name": "diffmae"}, {"name": "scratch", "pretrain": False}],
        "measures": [
            {"name": "tuned", "kind": "finetune", "task": "demo"},
            {"name": "filled", "kind": "inpaint", "task": "demo", "masks": ["center"], "seeds": [0]},
        ],
    }
)


def write_results(folder: Path) -> dict[tuple[str, int], float]:
    """Finished cells with made-up predictions; returns the accuracies of (arm, seed)."""
    folder.mkdir(parents=True)
    (folder / STUDY_FILE).write_text(STUDY.model_dump_json())
    grid = expand(STUDY)
    accuracies = {}
    for result in grid.results:
        cell = grid.cells[result.cell]
        place = folder / "cells" / cell.name
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"status": "finished"}))
        if cell.stage == "inpaint":
            figures = {"features": 0.25, "frechet": 80.0, "psnr_masked": 20.0}
            scores = {"center": {"DiffMAE, one sample": figures, "MAE's one step": {**figures, "features": 0.5}}}
            (place / "inpaint.json").write_text(json.dumps({"scores": scores}))
            continue
        generator = torch.Generator().manual_seed(result.seed + (10 if result.arm == "scratch" else 0))
        probabilities = torch.rand(40, 4, generator=generator)
        labels = torch.arange(40) % 4
        accuracy = probabilities.argmax(1).eq(labels).double().mean().item()
        accuracies[result.arm, result.seed] = accuracy
        predictions = Predictions([f"k{n}" for n in range(40)], labels, list("abcd"), {"1x1": probabilities})
        write_predictions(place / FILE, predictions)
        (place / "eval.json").write_text(json.dumps({"top1": accuracy}))
    return accuracies


def test_the_table_holds_means_deviations_and_paired_differences(tmp_path: Path) -> None:
    accuracies = write_results(tmp_path / "study")
    table = study_table(tmp_path / "study")
    column = next(column for column in table.columns if column.measure == "tuned")
    for arm in ("diffmae", "scratch"):
        wanted = [100 * accuracies[arm, seed] for seed in (0, 1)]
        assert list(table.values[arm][column].values()) == pytest.approx(wanted)
        text = f"{statistics.fmean(wanted):.1f} ± {statistics.stdev(wanted):.1f} (2)"
        assert table.cell(arm, column) == text
    difference = statistics.fmean(accuracies["diffmae", s] - accuracies["scratch", s] for s in (0, 1))
    assert table.tests["diffmae"][column].difference == pytest.approx(difference)
    assert table.tests["diffmae"][column].videos == 80
    assert "scratch" not in table.tests
    first = next(column for column in table.columns if column.figure == "center features, first step")
    assert table.cell("diffmae", first) == "0.500 (1)"
    assert table.cell("scratch", first) == "-"
    rows = list(csv.DictReader((tmp_path / "study" / "table.csv").read_text().splitlines()))
    assert {(r["arm"], r["seed"]): float(r["value"]) for r in rows if r["measure"] == "tuned"} == pytest.approx(
        {(arm, str(seed)): 100 * value for (arm, seed), value in accuracies.items()}
    )
    for name in ("table.md", "table.png", "report.html"):
        assert (tmp_path / "study" / name).stat().st_size > 0
    assert table.missing == 0


def test_results_that_are_not_there_yet_are_counted(tmp_path: Path) -> None:
    write_results(tmp_path / "study")
    grid = expand(STUDY)
    (tmp_path / "study" / "cells" / grid.results[0].cell / "run.json").unlink()
    assert study_table(tmp_path / "study").missing == 1
    assert "1 results are not there yet" in (tmp_path / "study" / "table.md").read_text()


def test_data_sets_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    grid = expand(STUDY)
    with pytest.raises(UsageError, match="No shards of demo are known here"):
        find_shards(grid, {})
    with pytest.raises(UsageError, match="--data other="):
        find_shards(grid, {"demo": "x", "other": "y"})
    with pytest.raises(UsageError, match="write it as NAME=PATH"):
        study_command("smoke", ["demo"], None, "1", "cpu", False)
    with pytest.raises(UsageError, match="--jobs many"):
        study_command("smoke", ["demo=x"], None, "many", "cpu", False)
    with pytest.raises(UsageError, match="holds no study"):
        study_table(tmp_path)


def test_slurm_gets_an_array_for_each_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMAE_WORKSPACE", str(tmp_path))
    script = write_slurm("smoke", {"demo": "shards"}, tmp_path / "study").read_text()
    levels = [(tmp_path / "study" / f"level-{number}.txt").read_text().splitlines() for number in range(3)]
    assert [len(level) for level in levels] == [3, 5, 2]  # scratch is one level ahead
    assert all(line.startswith("diffmae ") for level in levels for line in level)
    assert [f"--array=1-{len(level)}" in script for level in levels] == [True] * 3
    subprocess.run(["bash", "-n", str(tmp_path / "study" / "study.sbatch")], check=True)

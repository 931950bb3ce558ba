"""Studies: what a file may say, and the runs it comes to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffmae_video.config.study import Study, expand, read_study, study_names
from diffmae_video.errors import UsageError


def make(**changes) -> Study:
    tables = {
        "name": "s",
        "summary": "",
        "recipe": "smoke",
        "data": ["demo"],
        "baseline": "scratch",
        "seeds": [0, 1],
        "arms": [{"name": "diffmae"}, {"name": "scratch", "pretrain": False}],
        "measures": [{"name": "tuned", "kind": "finetune", "task": "demo"}],
    }
    return Study.model_validate(tables | changes)


def test_every_arm_measure_and_seed_has_one_result_after_the_runs_it_needs() -> None:
    grid = expand(make())
    assert [(r.arm, r.seed) for r in grid.results] == [("diffmae", 0), ("diffmae", 1), ("scratch", 0), ("scratch", 1)]
    names = list(grid.cells)
    for cell in grid.cells.values():
        assert cell.needs is None or names.index(cell.needs) < names.index(cell.name)
    assert [cell.stage for cell in grid.cells.values()].count("pretrain") == 1
    scratch = [cell for cell in grid.cells.values() if cell.arm == "scratch" and cell.stage == "finetune"]
    assert len(scratch) == 2
    assert all(cell.needs is None for cell in scratch)
    assert all(grid.cells[result.cell].stage == "eval" for result in grid.results)


def test_arms_that_pretrain_alike_share_the_run() -> None:
    arms = [{"name": "a"}, {"name": "b", "tune": ["train.base_lr=1e-3"]}, {"name": "scratch", "pretrain": False}]
    grid = expand(make(arms=arms))
    stages = [cell.stage for cell in grid.cells.values()]
    assert stages.count("pretrain") == 1
    assert stages.count("finetune") == 6


def test_pretraining_seeds_cycle_and_are_runs_of_their_own() -> None:
    grid = expand(make(seeds=[0, 1, 2], pretrain_seeds=[5, 6]))
    starts = [grid.cells[grid.cells[r.cell].needs] for r in grid.results if r.arm == "diffmae"]
    assert [grid.cells[cell.needs].seed for cell in starts] == [5, 6, 5]


def test_a_run_is_another_one_when_a_setting_it_depends_on_changes() -> None:
    before, after = expand(make()), expand(make(set=["mask.ratio=0.5"]))
    changed = {cell.name for cell in before.cells.values() if cell.arm == "diffmae"} & set(after.cells)
    assert not changed
    kept = {cell.name for cell in before.cells.values() if cell.arm == "scratch"}
    assert kept <= set(after.cells)


def test_a_scratch_arm_takes_the_model_and_has_no_inpainting() -> None:
    measures = [
        {"name": "tuned", "kind": "finetune", "task": "demo"},
        {"name": "filled", "kind": "inpaint", "task": "demo", "masks": ["center"]},
    ]
    grid = expand(make(set=["model.depth=3", "mask.ratio=0.5"], measures=measures))
    scratch = [cell for cell in grid.cells.values() if cell.arm == "scratch"]
    assert {cell.stage for cell in scratch} == {"finetune", "eval"}
    assert scratch[0].overrides == ("model.depth=3",)


def test_several_data_sets_are_mixed() -> None:
    grid = expand(make(data=["a", "b"]))
    pretrain = next(cell for cell in grid.cells.values() if cell.stage == "pretrain")
    assert (pretrain.kind, pretrain.data) == ("joint", ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "none"}, "none is no arm; the arms are diffmae, scratch"),
        ({"arms": [{"name": "scratch"}, {"name": "scratch"}]}, "the arm scratch is there twice"),
        ({"arms": [{"name": "../x"}]}, "String should match pattern"),
        ({"name": "a/b"}, "String should match pattern"),
        ({"seeds": []}, "at least 1 item"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ],
)
def test_what_a_study_may_not_say(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**changes)


def test_a_wrong_key_fails_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"train.base_ir.*did you mean train.base_lr"):
        expand(make(set=["train.base_ir=1"]))


def test_files_that_are_no_study_are_named(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    with pytest.raises(UsageError, match=r"s\.toml cannot be read"):
        read_study(str(file))
    file.write_text("name = [")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_study(str(file))
    file.write_text("name = 'x'")
    with pytest.raises(UsageError, match="field required"):
        read_study(str(file))
    with pytest.raises(UsageError, match="no such study"):
        read_study("nothing")


@pytest.mark.parametrize("name", study_names())
def test_built_in_studies_resolve(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert expand(study).results

"""`diffmae demo-data` and `diffmae demo` through the command line, with the smoke recipe."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest

from diffmae_video.cli.app import run
from diffmae_video.evaluation.inpainting import BASELINES
from diffmae_video.pipelines.inpaint_report import ONE_STEP, SAMPLE


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole demo, shared by the tests below; they do not change it."""
    folder = tmp_path_factory.mktemp("work") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert run(["demo", "--out", str(folder), "--recipe", "smoke", "--device", "cpu"]) == 0
    return folder


def test_every_stage_leaves_its_result(finished):
    state = json.loads((finished / "demo.json").read_text())
    assert list(state["stages"]) == [
        "demo-data",
        "shard",
        "pretrain",
        "finetune pretrained",
        "finetune scratch",
        "eval pretrained",
        "eval scratch",
        "inpainting",
        "render",
        "removal",
    ]
    assert state["stages"]["shard"]["written"] == state["stages"]["shard"]["found"] == 64
    for model in ("pretrained", "scratch"):
        evaluation = json.loads((finished / f"eval-{model}" / "eval.json").read_text())
        assert evaluation["videos"]["used"] == 16
        assert 0 <= state["stages"][f"eval {model}"]["top1"] <= 1
    (psnr,) = state["stages"]["inpainting"]["psnr"].values()
    assert sorted(psnr) == sorted([SAMPLE, ONE_STEP, *BASELINES])
    assert all(np.isfinite(value) for value in psnr.values())
    for folder in ("inpaint-1", "removal"):
        for name in ("sheet.png", "comparison.mp4", "inpainted.mp4"):
            assert (finished / folder / name).stat().st_size > 0
    removal = state["stages"]["removal"]
    assert removal["from_other_frames"] > 0.7
    assert removal["psnr"]["removal"] > removal["psnr"]["OpenCV Telea"] + 3


def test_only_one_model_starts_from_the_pre_training(finished):
    inits = {
        name: json.loads((finished / f"finetune-{name}" / "model.json").read_text())["info"]["init"]
        for name in ("pretrained", "scratch")
    }
    assert inits["scratch"] == "scratch"
    assert inits["pretrained"].endswith("pretrain")


def test_report_shows_what_was_measured(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    state = json.loads((finished / "demo.json").read_text())["stages"]
    assert f"{100 * state['eval pretrained']['top1']:.1f} %" in text
    for row in state["inpainting"]["psnr"].values():
        for method, value in row.items():
            assert html.escape(method) in text
            assert f"{value:.2f} dB" in text
    assert "the figures mean nothing" in text
    assert text.count("data:video/mp4;base64,") == 2
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', text)


def test_the_demo_keeps_to_its_own_folder(finished):
    assert [path.name for path in finished.parent.iterdir()] == ["demo"]


def test_running_again_repeats_nothing(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert before
    assert run(["demo", "--out", str(finished), "--recipe", "smoke"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("done before") == 10
    assert str(finished / "report.html") in shown.replace("\n", "")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--recipe", "demo"], "recipe"), (["--recipe", "smoke", "--seed", "5"], "seed")]
)
def test_another_demo_is_not_mixed_in(finished, arguments, word, capsys):
    assert run(["demo", "--out", str(finished), *arguments]) == 2
    message = capsys.readouterr().err
    assert word in message
    assert "name another folder" in message


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["demo", "--out", str(tmp_path), "--recipe", "smoke"]) == 2
    assert "already holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_demo_data_writes_and_refuses(tmp_path, capsys):
    target = tmp_path / "clips"
    command = [
        "demo-data",
        str(target),
        "--train",
        "3",
        "--val",
        "2",
        "--frames",
        "4",
        "--size",
        "48",
        "--workers",
        "1",
    ]
    assert run(command) == 0
    assert "3 train, 2 val" in capsys.readouterr().out
    assert len(list(target.rglob("*.mp4"))) == 5
    assert run(command) == 2
    assert "already holds something" in capsys.readouterr().err
    assert run(["demo-data", str(tmp_path / "odd"), "--size", "33"]) == 2
    assert not (tmp_path / "odd").exists()

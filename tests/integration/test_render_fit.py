"""`diffmae render-inpaint --fit`: a clip and no model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffmae_video.cli.app import run
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter
from diffmae_video.training.clip_fit import FitStream

HEIGHT, WIDTH, COUNT = 36, 52, 8
BOX = "box:20,10,12,12"
RECIPE = """
[model]
width = 16
depth = 1
heads = 2
frames = 4
size = [16, 16]
tubelet = 2
patch = 4
positions = "rotary"
decoder_depth = 1
decoder_width = 16
decoder_heads = 2
objective = "mae"
[data]
stride = 1
[train]
batch_size = 2
precision = "fp32"
picture_every = 0
"""


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A still camera, in a new workspace that holds a small recipe; something moves below the box."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE, encoding="utf-8")
    blocks = np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    still = blocks.repeat(4, 0).repeat(4, 1)
    writer = VideoWriter(tmp_path / "clip.mkv", (HEIGHT, WIDTH), Fraction(1, 25), Fraction(25), codec="ffv1")
    for number in range(COUNT):
        frame = still.copy()
        frame[26:32, 3 * number : 3 * number + 6] = 255
        writer.write(frame, number)
    writer.close()
    return tmp_path / "clip.mkv"


def render(clip: Path, *arguments: str, fit: str = "3steps") -> int:
    chosen = ["--fit", fit, "--set", "render.fit_recipe=small.toml", "--lossless", "--device", "cpu"]
    return run(["render-inpaint", str(clip), *chosen, *arguments])


def result(folder: str = "runs/render-001") -> dict[str, Any]:
    return json.loads((Path(folder) / "result.json").read_text())


def pixels(path: Path | str) -> np.ndarray:
    return np.stack([frame.rgb for frame in VideoSource(path)])


def test_what_no_frame_shows_is_filled_by_a_model_of_the_clip(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(clip, "--mask", BOX) == 0
    told = result()
    assert told["fit_steps"] == 3
    assert told["modelled_share"] > 0.5
    assert Path(told["checkpoint"]).name == "fit-001"
    source, made = pixels(clip), pixels("runs/render-001/inpainted.mkv")
    changed = (source != made).any(-1)
    outside = np.ones((HEIGHT, WIDTH), dtype=bool)
    outside[10:22, 20:32] = False
    assert not changed[:, outside].any()
    assert changed[:, ~outside].mean() > 0.5
    capsys.readouterr()
    assert render(clip, "--mask", "box:22,12,6,6", "--out", "second") == 0
    assert "before (3 steps)" in capsys.readouterr().out
    assert len(list(Path("runs").glob("fit-*"))) == 1


def test_a_stopped_fit_continues_and_ends_in_the_same_video(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = FitStream.sample

    def interrupted(stream: FitStream, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return sample(stream, number)

    with monkeypatch.context() as patch:
        patch.setattr(FitStream, "sample", interrupted)
        assert render(clip, "--mask", BOX, fit="5steps") == 75
    assert render(clip, "--mask", BOX, fit="5steps") == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["fit-001", "render-001"]
    assert render(clip, "--mask", BOX, "--resume", "never", "--out", "whole", fit="5steps") == 0
    assert Path("runs/fit-002").is_dir()
    names = ("inpainted.mkv", "sheet.png")
    assert all((Path("runs/render-001") / name).read_bytes() == (Path("whole") / name).read_bytes() for name in names)


KILLED = """
import os, signal
from diffmae_video.cli.app import main
from diffmae_video.training.clip_fit import FitStream
sample = FitStream.sample
def sample_or_die(stream, number):
    if number == 8:  # the fifth step: two checkpoints are on disk
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(stream, number)
FitStream.sample = sample_or_die
main()
"""


def test_a_killed_fit_continues_and_ends_in_the_same_video(clip: Path) -> None:
    with Path("small.toml").open("a", encoding="utf-8") as file:
        file.write("checkpoint_every = 2\n")
    arguments = ["render-inpaint", str(clip), "--fit", "6steps", "--set", "render.fit_recipe=small.toml", "--lossless"]
    arguments += ["--device", "cpu", "--mask", BOX]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(Path("runs/fit-001/checkpoints").iterdir())
    assert not Path("runs/render-001/inpainted.mkv").exists()
    assert run(arguments) == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["fit-001", "render-001"]
    assert run([*arguments, "--resume", "never", "--out", "whole"]) == 0
    assert Path("runs/fit-002").is_dir()
    one, two = (Path(at) / "inpainted.mkv" for at in ("runs/render-001", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_no_model_is_made_where_other_frames_show_all_of_it(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(clip, "--track", "0:4,8,8,8;7:36,8,8,8") == 0
    assert "no model is needed" in capsys.readouterr().out
    told = result()
    assert (told["fit_steps"], told["checkpoint"], told["modelled_share"]) == (None, None, 0.0)
    assert not list(Path("runs").glob("fit-*"))


def test_a_generated_mask_is_scored_with_a_model_of_the_clip(clip: Path) -> None:
    assert render(clip, "--mask", "tube:0.5") == 0
    assert result()["psnr_masked"] > 0
    assert result()["modelled_share"] == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--fit", "soon"], "--fit soon"),
        (["--fit", "9s", "--propagate", "only"], "leave --fit away"),
        (["--set", "render.fit=7"], "render.fit"),
    ],
)
def test_what_cannot_be_asked(clip: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert run(["render-inpaint", str(clip), "--mask", BOX, *arguments]) == 2
    assert part in capsys.readouterr().err
    assert not Path("runs").exists()

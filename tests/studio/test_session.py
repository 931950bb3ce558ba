"""What the studio does, without a page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffmae_video.cli.app import run
from diffmae_video.errors import DataError, Stopped, UsageError
from diffmae_video.pipelines.console import Step
from diffmae_video.pipelines.job import Job
from diffmae_video.rendering.source import VideoSource
from diffmae_video.studio import session as studio
from diffmae_video.studio.session import Session, describe
from tests.studio.scene import HEIGHT, WIDTH, write_scene

COUNT = 8


def painted(hidden: np.ndarray) -> bytes:
    return cv2.imencode(".png", hidden.astype(np.uint8) * 255)[1].tobytes()


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / (one | two).sum())


@pytest.fixture
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    monkeypatch.chdir(tmp_path)
    return write_scene(tmp_path / "clip.mkv", "ffv1", COUNT)


def test_marked_by_a_box_followed_corrected_and_rendered(truth: list[np.ndarray]) -> None:
    session = Session(Job(seed=3), Path("studio"))
    with pytest.raises(UsageError, match="No clip is open"):
        session.run()
    assert "200x120, 8 frames" in session.open("clip.mkv", keep=True)
    with pytest.raises(UsageError, match="Nothing is marked"):
        session.run()
    rows, columns = (np.flatnonzero(truth[3].any(axis)) for axis in (1, 0))
    left, top, right, bottom = columns[0] - 3, rows[0] - 3, columns[-1] + 4, rows[-1] + 4
    session.mark_box(3, (left / WIDTH, top / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT))
    assert overlap(session.mask(3), truth[3]) > 0.9
    steps: list[Step] = []
    assert session.follow(told=steps.append) == []
    assert min(overlap(session.mask(n), truth[n]) for n in range(COUNT)) > 0.8
    assert (steps[-1].label, steps[-1].done, steps[-1].total) == ("follow", COUNT, COUNT)

    session.mark(7, painted(np.zeros((60, 100), dtype=bool)))  # gone there, painted at another size
    session.mark(0, painted(truth[0]))
    assert session.state()["marked"] == [0, 3, 7]
    session.forget(0)
    steps.clear()
    result = session.run(dilate=2, told=steps.append)
    assert {step.label for step in steps} >= {"follow", "render-inpaint"}
    assert not session.mask(7).any()
    assert not session.mask(6).any()  # nearer to the frame where it is gone
    before, after = (list(VideoSource(path)) for path in ("clip.mkv", result.video))
    assert after[1].rgb[truth[1]].mean() > before[1].rgb[truth[1]].mean() + 40
    assert Path(result.video).suffix == ".mp4"
    assert session.state()["result"] == COUNT

    command = session.command(dilate=2)
    assert command.startswith("diffmae render-inpaint studio/clip/clip.mkv --mask studio/clip/mask.mp4 --dilate 2")
    assert run([*command.split()[1:], "--out", "again"]) == 0
    again = VideoSource("again/inpainted.mp4")
    assert all(np.array_equal(one.rgb, two.rgb) for one, two in zip(after, again, strict=True))


def test_what_stays_is_hidden_where_it_was_marked(truth: list[np.ndarray]) -> None:
    session = Session(Job(), Path("studio"))
    session.open("clip.mkv")
    session.mark(2, painted(truth[2]))
    session.mark(6, painted(truth[6]))
    session.follow(still=True)
    for number in range(COUNT):
        np.testing.assert_array_equal(session.mask(number), truth[2 if number <= 4 else 6])


def test_stopping_ends_the_work_and_keeps_the_marks(truth: list[np.ndarray]) -> None:
    session = Session(Job(), Path("studio"))
    session.open("clip.mkv")
    session.mark(2, painted(truth[2]))

    def stop(step: Step) -> None:
        if step.label == "render-inpaint":
            raise Stopped("Stopped.")

    with pytest.raises(Stopped):
        session.run(told=stop)
    assert session.state()["marked"] == [2]
    assert session.state()["result"] == 0
    assert not list(Path().rglob("inpainted.mp4"))


def test_what_a_page_sends_is_checked(truth: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Job(), Path("studio"))
    session.open("clip.mkv")
    good = painted(truth[0])
    huge = good[:16] + (100_000).to_bytes(4, "big") * 2 + good[24:]
    for data, says in ((b"GIF89a", "did not arrive"), (good[:60], "did not arrive whole"), (huge, "too large")):
        with pytest.raises(UsageError, match=says):
            session.mark(0, data)
    for number in (-1, COUNT):
        with pytest.raises(UsageError, match="frames 0 to 7"):
            session.mark(number, good)
    for box in ((0.5, 0.5, 0.7, 0.1), (-0.1, 0, 0.5, 0.5), (float("nan"), 0, 0.5, 0.5), (0.2, 0.2, 0, 0.2)):
        with pytest.raises(UsageError, match="does not lie in the picture"):
            session.mark_box(0, box)
    Path("no.mp4").write_text("#EXTM3U\nhttp://stranger.example/\n")
    with pytest.raises(DataError):
        session.open("no.mp4")
    assert session.state()["name"] == "clip.mkv"  # what was open stays
    monkeypatch.setattr(studio, "MOST_FRAMES", 5)
    with pytest.raises(DataError, match="cut it to 5"):
        session.open("clip.mkv")


def test_a_step_in_words() -> None:
    assert describe(Step("follow", 12, 120, "frames", 75.0)) == "follow: 12 of 120 frames, 1m15s left"
    assert describe(Step("read", 0, None, "frames", None)) == "read: 0 frames"


def test_without_gradio_the_command_says_what_to_install() -> None:
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gradio" else found(name, *rest)
from diffmae_video.cli.app import run
sys.exit(run(["studio"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "diffmae: The studio needs Gradio; install it: pip install 'diffmae-video[studio]'.\n"

"""`diffmae render-inpaint` through the command line."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffmae_video.cli.app import run
from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.mask_text import MaskRequest
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.weights import save_model
from diffmae_video.pipelines.render_resume import TakenFiles, WindowFiles
from diffmae_video.rendering.fillers import Taken
from diffmae_video.rendering.inpaint import Sampled
from diffmae_video.rendering.masks import ClipShape, build_mask
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter
from diffmae_video.training.run import lock

from ..data.clips import make_video

HEIGHT, WIDTH, COUNT = 36, 52, 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ModelSettings(
        preset="nano", width=32, depth=1, heads=2, frames=4, size=(16, 16), tubelet=2, patch=4,
        decoder_depth=1, decoder_width=32, decoder_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_model(DiffMAE(settings, DiffusionSettings()), folder, {"kind": "diffmae"})
    return folder


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clip in an empty folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    return write_clip(tmp_path / "clip.mkv", COUNT)


def write_clip(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    writer = VideoWriter(path, (HEIGHT, WIDTH), Fraction(1, 25), Fraction(25), codec="ffv1")
    for n in range(count):
        writer.write(np.roll(base, n, axis=1), n)
    writer.close()
    return path


def render(clip: Path, model: Path, *arguments: str) -> int:
    steps = [] if "--steps" in arguments else ["--steps", "2"]
    return run(["render-inpaint", str(clip), "--checkpoint", str(model), "--stride", "1", *steps, *arguments])


def pixels(path: Path) -> np.ndarray:
    return np.stack([frame.rgb for frame in VideoSource(path)])


def test_a_label_needs_a_model_that_knows_it(clip: Path, model: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["--guidance", "3"], "give --label NAME, too"),
        (["--label", "jump"], "was trained without labels"),
        (["--label", "jump", "--fit", "2steps"], "no model that knows labels is asked"),
    ):
        assert render(clip, model, "--mask", "box:0,0,8,8", "--out", "out", *words) == 2
        assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_everything_is_written(clip: Path, model: Path) -> None:
    assert render(clip, model, "--mask", "center", "--out", "out", "--samples", "2") == 0
    names = {path.name for path in Path("out").iterdir()}
    assert names == {
        "inpainted.mp4", "inpainted-2.mp4", "comparison.mp4", "trajectory.mp4", "sheet.png", "uncertainty.png",
        "result.json", "report.html", "config.toml", "run.json", "run.lock",
    }  # fmt: skip
    result = json.loads(Path("out/result.json").read_text())
    assert result["frames"] == COUNT
    assert 0 < result["psnr_masked"] < 40
    assert -1 <= result["ssim_masked"] <= 1
    assert {"seconds", "steps", "seed", "sampler", "windows"} <= set(result)
    assert (result["removal"], result["modelled_share"], result["propagated_share"]) == (False, 1, 0)
    report = Path("out/report.html").read_text()
    assert report.count("data:video/mp4;base64") >= 2
    entries = json.loads(Path(".diffmae/workspace.json").read_text())["entries"]
    assert entries[-1]["kind"] == "render"


PLAY = """<script>onload = async () => {
    const played = []
    for (const video of document.querySelectorAll("video")) {
        video.muted = true
        await video.play().then(() => played.push([video.videoWidth, video.videoHeight, video.duration]), played.push)
    }
    const text = Object.assign(document.createElement("pre"), {id: "played", textContent: JSON.stringify(played)})
    document.body.append(text)
}</script>"""


def test_the_videos_of_a_report_play_in_a_browser(clip: Path, model: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here")
    assert render(clip, model, "--mask", "center", "--out", "out") == 0
    page, policies = re.subn("<meta http-equiv[^>]*>", "", Path("out/report.html").read_text())  # which forbids scripts
    assert policies == 1
    Path("page.html").write_text(page.replace("</main>", PLAY + "</main>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    command = [chromium, *options, "--virtual-time-budget=20000", "--dump-dom", Path("page.html").resolve().as_uri()]
    shown = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    played = json.loads(re.search(r'id="played">([^<]*)<', shown)[1])
    sizes = []
    for name in ("comparison.mp4", "inpainted.mp4", "trajectory.mp4"):
        with av.open(f"out/{name}") as container:
            stream = container.streams.video[0]
            sizes.append([stream.width, stream.height, pytest.approx(container.duration / 1e6, abs=0.05)])
    assert played == sizes


def test_a_report_embeds_no_more_than_a_page_can_hold(clip: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmae_video.pipelines.render_report.EMBEDDED_MEGABYTES", 0.001)
    assert render(clip, model, "--mask", "center", "--out", "out") == 0
    report = Path("out/report.html").read_text()
    assert report.count("data:video/mp4;base64") == 1  # the trajectory, whose length does not grow
    assert "<code>comparison.mp4</code>" in report
    assert "<code>inpainted.mp4</code>" in report


@pytest.mark.parametrize(
    "mask", ["random:0.75", "tube:0.5", "center", "block:0.5", "frames:2-4", "future:0.3", "box:5,6,20,15@2-7"]
)
def test_lossless_is_bit_equal_outside_the_mask(clip: Path, model: Path, mask: str) -> None:
    # what other frames show would come back as it was
    assert render(clip, model, "--mask", mask, "--propagate", "off", "--lossless", "--out", "out") == 0
    source, result = pixels(clip), pixels(Path("out/inpainted.mkv"))
    assert source.shape == result.shape
    share = json.loads(Path("out/result.json").read_text())["masked_share"]
    changed = (source != result).any(-1)
    assert 0 < changed.mean() <= share
    if mask.startswith("box"):
        assert not changed[:2].any()
        assert not changed[8:].any()
        assert not changed[:, :6].any()
        assert not changed[:, :, 25:].any()
        assert changed[2:8, 6:21, 5:25].mean() > 0.7  # the edge often meets the colour beside it


def test_an_image_and_a_folder_of_frames(clip: Path, model: Path) -> None:
    Path("frames").mkdir()
    for n, picture in enumerate(pixels(clip)):
        Image.fromarray(picture).save(f"frames/{n}.png")
    assert render(Path("frames"), model, "--mask", "box:5,5,9,9", "--codec", "png", "--out", "a") == 0
    assert sorted(path.name for path in Path("a/inpainted").iterdir()) == [f"{n:05d}.png" for n in range(COUNT)]
    assert render(Path("frames/0.png"), model, "--mask", "center", "--out", "b") == 0
    assert np.asarray(Image.open("b/inpainted.png")).shape == (HEIGHT, WIDTH, 3)
    assert Path("b/comparison.png").is_file()
    assert render(clip, model, "--mask", "center", "--codec", "gif", "--out", "c") == 0
    assert Image.open("c/inpainted.gif").n_frames == COUNT


def test_drawn_mask_removes_an_object(clip: Path, model: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[8:20, 10:30] = 255
    Image.fromarray(mask).save("mask.png")
    exact = ["--lossless", "--propagate", "off", "--set", "render.blend=false"]  # which leaves no pixel as it was
    assert render(clip, model, "--mask", "mask.png", "--dilate", "2", *exact, "--out", "out") == 0
    changed = (pixels(clip) != pixels(Path("out/inpainted.mkv"))).any((0, 3))
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 21, 8, 31)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--mask", "box:0,0,500,10"], 2, "52x36 pixels"),
        (["--mask", "wrong"], 2, "no mask and no file"),
        (["--mask", "box:0,0,100%,100%"], 2, "whole clip"),
        (["--mask", "center", "--mask", "center", "--invert", "--mask", "box:0,0,100%,100%"], 2, "hides nothing"),
        (["--mask", "center", "--lossless", "--codec", "gif"], 2, "--lossless"),
        (["--mask", "gone.png"], 2, "no such file"),
        (["--mask", "center", "--fps", "12"], 2, "clip.mkv has times of its own"),
        (["--mask", "center,random:0.5"], 2, "its own --mask"),
        (["--mask", "center", "--codec", "av1"], 2, "--codec av1: choose h264, ffv1, gif or png"),
        (["--mask", "center", "--sampler", "euler"], 2, "--sampler euler"),
        (["--mask", "center", "--steps", "5000"], 2, "1000 timesteps"),
        (["--mask", "frames:0-8"], 2, "hidden whole"),
        (["--mask", "box:1,1,9,9", "--propagate", "on"], 2, "--propagate on: choose auto, off or only"),
        (["--mask", "box:1,1,9,9", "--propagate", "only"], 2, "leave --checkpoint away"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(
    clip: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    assert render(clip, model, *arguments, "--out", "out") == code
    message = capsys.readouterr().err.strip()
    assert part in message
    assert message.count("\n") == 0
    assert not Path("out").exists()


def test_missing_model_and_clip(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["render-inpaint", str(clip), "--fit", "off"]) == 2
    assert "diffmae pretrain --video" in capsys.readouterr().err
    assert run(["render-inpaint", str(clip)]) == 2  # no minutes of training for a mask that nobody asked for
    assert "Nothing says what should go: give --mask" in capsys.readouterr().err
    assert render(Path("gone.mp4"), model, "--mask", "center") == 3
    Path("text.mp4").write_text("hello")
    assert render(Path("text.mp4"), model, "--mask", "center") == 3
    Path("used").mkdir()
    Path("used/file").touch()
    assert render(clip, model, "--mask", "center", "--out", "used") == 2
    assert sorted(path.name for path in Path("used").iterdir()) == ["file"]
    assert not Path("runs").exists()


def test_interlaced_clips_are_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, params in (("plain", ""), ("fields", "tff=1")):
        for name in ("a", "b"):
            make_video(tmp_path / folder / f"{name}/{name}.mp4", frames=4, options={"x264-params": params})
        assert run(["shard", str(tmp_path / folder), str(tmp_path / f"{folder}-shards")]) == 0
        told = "2 clips are interlaced and stay so" in capsys.readouterr().out
        assert told == bool(params)
        words = ["--mask", "center", "--dry-run"]
        assert render(tmp_path / folder / "a/a.mp4", model, *words) == 0
        assert ("is interlaced" in capsys.readouterr().out) == bool(params)


def test_a_dry_run_makes_nothing(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(clip, model, "--mask", "center", "--dry-run") == 0
    assert "25.0% hidden" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_killed_and_continued_equals_uninterrupted(clip: Path, model: Path) -> None:
    long = write_clip(Path("long.mkv"), 60)
    common = ["--mask", "center", "--lossless", "--steps", "100"]
    main = "from diffmae_video.cli.app import main; main()"
    command = [sys.executable, "-c", main, "render-inpaint", str(long), "--checkpoint", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--stride", "1", *common], env=environment)
    store = Path("runs/render-001/.work/windows")
    while process.poll() is None and len(list(store.glob("*.npz"))) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("runs/render-001/inpainted.mkv").exists()
    kept = len(list(store.glob("*.npz")))
    assert kept >= 4
    assert render(long, model, *common) == 0
    result = json.loads(Path("runs/render-001/result.json").read_text())
    assert result["windows_resumed"] == kept < result["windows"]
    assert not list(Path("runs/render-001").glob(".*"))
    assert VideoSource("runs/render-001/trajectory.mp4").frames > 60  # kept from before the kill
    assert render(long, model, *common, "--resume", "never", "--out", "whole") == 0
    for name in ("inpainted.mkv", "comparison.mp4", "trajectory.mp4", "sheet.png"):
        assert (Path("runs/render-001") / name).read_bytes() == (Path("whole") / name).read_bytes(), name


def test_a_signal_during_a_render_is_one_sentence_and_the_next_call_continues(
    clip: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the second batch has been kept."""
    save = WindowFiles.save

    def save_then_signal(self: WindowFiles, key: str, sampled: Sampled) -> None:
        save(self, key, sampled)
        if len(list(self.folder.glob("*.npz"))) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["--mask", "center", "--samples", "2", "--lossless"]
    with monkeypatch.context() as patch:
        patch.setattr(WindowFiles, "save", save_then_signal)
        assert render(clip, model, *arguments) == 75
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert "SIGTERM" in message
    assert not Path("runs/render-001/inpainted.mkv").exists()
    assert not list(Path("runs/render-001").glob(".*.tmp"))
    assert render(clip, model, *arguments) == 0
    assert json.loads(Path("runs/render-001/result.json").read_text())["windows_resumed"] == 2
    assert render(clip, model, *arguments, "--resume", "never", "--out", "whole") == 0
    for name in ("inpainted.mkv", "inpainted-2.mkv", "trajectory.mp4", "uncertainty.png"):
        assert (Path("runs/render-001") / name).read_bytes() == (Path("whole") / name).read_bytes(), name


TRACK = "0:5,8,14,12;9:30,8,14,12"  # moves over a pattern that moves the same way


def test_a_removal_needs_no_model_and_is_not_compared_with_what_went(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a fresh machine, where no model is known."""
    assert run(["render-inpaint", str(clip), "--track", TRACK, "--fit", "off", "--lossless", "--out", "out"]) == 0
    assert "No model is known" in capsys.readouterr().out
    assert run(["render-inpaint", str(clip), "--track", TRACK, "--propagate", "only", "--lossless", "--out", "b"]) == 0
    assert "No model is known" not in capsys.readouterr().out
    assert (Path("out") / "inpainted.mkv").read_bytes() == (Path("b") / "inpainted.mkv").read_bytes()
    result = json.loads(Path("out/result.json").read_text())
    assert result["removal"] is True
    assert result["checkpoint"] is None
    assert {value for name, value in result.items() if name.startswith(("psnr", "ssim"))} == {None}
    assert result["propagated_share"] > 0.3
    assert result["propagated_share"] + result["classical_share"] == pytest.approx(1)
    assert "Against the source" not in Path("out/report.html").read_text()
    mask = build_mask(MaskRequest((), TRACK), ClipShape(HEIGHT, WIDTH, COUNT, 25.0, (2, 4, 4), 4))
    hidden = np.stack([mask(n) for n in range(COUNT)])
    source, made = pixels(clip), pixels(Path("out/inpainted.mkv"))
    np.testing.assert_array_equal(made[~hidden], source[~hidden])
    assert [frame.pts for frame in VideoSource("out/inpainted.mkv")] == [frame.pts for frame in VideoSource(clip)]


def test_a_generated_mask_without_a_model(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["render-inpaint", str(clip), "--mask", "tube:0.5", "--propagate", "off", "--fit", "off"]) == 2
    assert "--mask object.png" in capsys.readouterr().err
    assert run(["render-inpaint", str(clip), "--mask", "block:0.3", "--propagate", "only", "--out", "out"]) == 0
    assert json.loads(Path("out/result.json").read_text())["psnr_masked"] > 0


def test_a_removal_with_a_model_stopped_and_continued_equals_one_that_was_not(
    clip: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = TakenFiles.save

    def save_then_signal(self: TakenFiles, number: int, taken: Taken) -> None:
        save(self, number, taken)
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["--track", TRACK, "--mask", "box:0,20,14,14", "--samples", "2", "--lossless"]
    with monkeypatch.context() as patch:
        patch.setattr(TakenFiles, "save", save_then_signal)
        assert render(clip, model, *arguments) == 75
    assert len(list(Path("runs/render-001/.work/taken").glob("*.npz"))) == 7
    assert render(clip, model, *arguments) == 0
    assert render(clip, model, *arguments, "--resume", "never", "--out", "whole") == 0
    for name in ("inpainted.mkv", "inpainted-2.mkv", "comparison.mp4", "sheet.png"):
        assert (Path("runs/render-001") / name).read_bytes() == (Path("whole") / name).read_bytes(), name
    one, two = (json.loads((Path(at) / "result.json").read_text()) for at in ("runs/render-001", "whole"))
    places = ("directory", "video", "seconds", "windows_resumed")
    assert {k: v for k, v in one.items() if k not in places} == {k: v for k, v in two.items() if k not in places}
    assert 0 < one["propagated_share"] < 1
    assert one["modelled_share"] > 0
    assert one["propagated_share"] + one["modelled_share"] + one["classical_share"] == pytest.approx(1)


KILLED = """
import os, signal, sys
from diffmae_video.cli.app import main
from diffmae_video.pipelines.render_resume import TakenFiles
save = TakenFiles.save
def save_then_die(self, number, taken):
    save(self, number, taken)
    if number == 6:
        os.kill(os.getpid(), signal.SIGKILL)
TakenFiles.save = save_then_die
main()
"""


def test_a_removal_killed_and_continued_equals_one_that_was_not(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the process when SIGKILL comes; what was taken from other frames is on disk."""
    arguments = ["render-inpaint", str(clip), "--track", TRACK, "--propagate", "only", "--lossless"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = {path.stem: path.read_bytes() for path in Path("runs/render-001/.work/taken").glob("*.npz")}
    assert set(kept) == {str(number) for number in range(7)}
    assert not Path("runs/render-001/inpainted.mkv").exists()
    saved: list[int] = []
    save = TakenFiles.save
    with monkeypatch.context() as patch:
        patch.setattr(TakenFiles, "save", lambda *given: (saved.append(given[1]), save(*given)))
        assert run(arguments) == 0
    assert saved == [7, 8, 9]  # the others were not computed again
    assert not list(Path("runs/render-001").glob(".*"))
    assert run([*arguments, "--resume", "never", "--out", "whole"]) == 0
    for name in ("inpainted.mkv", "comparison.mp4", "sheet.png"):
        assert (Path("runs/render-001") / name).read_bytes() == (Path("whole") / name).read_bytes(), name


def test_a_folder_in_use_is_left_alone(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(Path("out")):
        Path("out/.inpainted.mp4.1.tmp").write_text("of the other render")
        assert render(clip, model, "--mask", "center", "--out", "out") == 2
    assert "--out" in capsys.readouterr().err
    assert Path("out/.inpainted.mp4.1.tmp").exists()


def test_a_render_that_is_done_is_not_done_again(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(clip, model, "--mask", "center", "--out", "out") == 0
    before = Path("out/inpainted.mp4").stat().st_mtime_ns
    assert render(clip, model, "--mask", "center", "--out", "out") == 0
    assert "done before" in capsys.readouterr().out
    assert Path("out/inpainted.mp4").stat().st_mtime_ns == before
    assert render(clip, model, "--mask", "box:1,1,9,9", "--out", "out") == 2
    assert "--out out" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(
    clip: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / "weights.safetensors"
    save_file({name: torch.full_like(one, float("nan")) for name, one in load_file(file).items()}, file)
    assert render(clip, broken, "--mask", "center", "--out", "out") == 3
    message = capsys.readouterr().err.strip()
    assert "weights.safetensors" in message
    assert message.count("\n") == 0
    assert not Path("out").exists()


def test_a_pipe_is_no_clip(clip: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.mp4")
    for path in (Path("pipe.mp4"), Path("/dev/zero")):
        assert render(path, model, "--mask", "center") == 3
        assert "no plain file" in capsys.readouterr().err


@pytest.mark.slow
def test_hostile_files_render_or_end_with_one_sentence(
    shared_data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [path for path in sorted((shared_data / "hostile").rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix not in (".md", ".csv")]
    assert len(files) >= 80
    for number, path in enumerate(files):
        out = tmp_path / "out"
        propagate = "auto" if number % 8 == 0 else "off"  # half a minute for each file
        steps = ["--steps", "1", "--stride", "4", "--propagate", propagate]
        code = render(path, model, "--mask", "box:25%,25%,50%,50%", "--out", str(out), *steps)
        message = capsys.readouterr().err.strip()
        if code == 0:
            source = VideoSource(path)
            frames = sum(1 for _ in source)
            assert json.loads((out / "result.json").read_text())["frames"] == frames, path.name
            assert not list(out.glob(".*")), path.name
            if source.kind == "video":
                with av.open(str(out / "inpainted.mp4")) as made:
                    stream = made.streams.video[0]
                    assert (stream.height, stream.width) == (source.height, source.width), path.name
                    assert sum(1 for _ in made.decode(video=0)) == frames, path.name
            source.close()
            shutil.rmtree(out)
        else:
            assert code in (2, 3), (path.name, code, message)
            assert message.count("\n") == 0, (path.name, message)
            assert not out.exists(), path.name
    assert {path.name for path in tmp_path.iterdir()} == {".diffmae"}  # nothing else was left or made


MASKS = {
    "random": ["--mask", "random:0.75"],
    "tube": ["--mask", "tube:0.5"],
    "center": ["--mask", "center"],
    "block": ["--mask", "block:0.5"],
    "frames": ["--mask", "frames:2-4"],
    "future": ["--mask", "future:0.3"],
    "box": ["--mask", "box:10%,20%,30%,40%@1-7"],
    "several, inverted, grown": ["--mask", "box:10%,10%,60%,60%", "--mask", "center", "--invert", "--dilate", "3"],
    "track": ["--track", "0:5,5,40,30;9:60,40,40,30"],
}


@pytest.mark.slow
def test_every_real_clip_is_bit_equal_outside_every_mask_and_keeps_its_times(
    shared_data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first frames of each real clip, as its own packets; `build_mask` says where the mask is."""
    monkeypatch.chdir(tmp_path)
    clips = sorted((shared_data / "clips").iterdir())[:20]
    assert len(clips) >= 20
    for clip in clips:
        short = first_packets(clip, tmp_path / f"short{clip.suffix}", 14)
        source = VideoSource(short)
        frames = list(source)
        source.close()
        for name, arguments in MASKS.items():
            assert render(short, model, *arguments, "--lossless", "--steps", "1", "--out", "out") == 0, (clip, name)
            made = VideoSource("out/inpainted.mkv")
            assert (made.height, made.width) == (source.height, source.width), (clip, name)
            results = list(made)
            made.close()
            assert len(results) == len(frames), (clip, name)
            mask = build_mask(
                MaskRequest(
                    tuple(arguments[1::2][: arguments.count("--mask")]),
                    track=arguments[1] if name == "track" else None,
                    dilate=3 if "--dilate" in arguments else 0,
                    invert="--invert" in arguments,
                ),
                ClipShape(source.height, source.width, source.frames, float(source.fps), (2, 4, 4), 4),
            )
            for number, (before, after) in enumerate(zip(frames, results, strict=True)):
                visible = ~mask(number)
                np.testing.assert_array_equal(after.rgb[visible], before.rgb[visible], str((clip, name, number)))
                late = after.pts * made.time_base - before.pts * source.time_base
                assert abs(late) <= Fraction(1, 1000), (clip, name, number)  # Matroska's milliseconds
            shutil.rmtree("out")
        short.unlink()


def first_packets(clip: Path, target: Path, count: int) -> Path:
    """The first `count` video packets of a clip in a file of the same kind, not encoded anew."""
    with av.open(str(clip), metadata_errors="replace") as given, av.open(str(target), "w") as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        for packet in itertools.islice(given.demux(stream), count):
            if packet.dts is not None:
                packet.stream = copy
                made.mux(packet)
    return target

"""`render-inpaint --follow`: from one marked frame to a rendered clip and a mask to look at."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmae_video.cli.app import run
from diffmae_video.config import DiffusionSettings, ModelSettings
from diffmae_video.mask_text import MaskRequest
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.weights import save_model
from diffmae_video.rendering.masks import ClipShape, build_mask
from diffmae_video.rendering.sam import follow_with_sam, load_sam
from diffmae_video.rendering.source import VideoSource
from diffmae_video.rendering.writers import VideoWriter

HEIGHT, WIDTH, COUNT = 48, 64, 8


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
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A clip `clip.mkv` in the current folder and the masks of the dark square that moves in it."""
    monkeypatch.chdir(tmp_path)
    bright = np.random.default_rng(0).integers(120, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    skin = np.random.default_rng(1).integers(0, 80, (20, 20, 3), dtype=np.uint8)
    writer, masks = VideoWriter(Path("clip.mkv"), (HEIGHT, WIDTH), Fraction(1, 10), Fraction(10), codec="ffv1"), []
    for n in range(COUNT):
        frame, hidden = bright.copy(), np.zeros((HEIGHT, WIDTH), dtype=bool)
        place = slice(12, 32), slice(10 + 2 * n, 30 + 2 * n)
        frame[place], hidden[place] = skin, True
        writer.write(frame, n)
        masks.append(hidden)
    writer.close()
    return masks


def read_back(path: str) -> list[np.ndarray]:
    mask = build_mask([path], ClipShape(HEIGHT, WIDTH, COUNT, 10.0, (2, 4, 4), 4))
    return [mask(number).copy() for number in range(COUNT)]


def render(model: Path, *arguments: str) -> int:
    common = ["--checkpoint", str(model), "--stride", "1", "--steps", "1", "--lossless"]
    common += [] if "--dilate" in arguments else ["--dilate", "0"]
    return run(["render-inpaint", "clip.mkv", *common, *arguments])


def test_an_object_marked_once_is_rendered_everywhere_and_its_mask_is_kept(
    truth: list[np.ndarray], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(truth[3]).save("object.png")
    assert render(model, "--mask", "object.png@3", "--follow", "--out", "out") == 0
    assert "followed to 8 of 8 frames" in capsys.readouterr().out
    found = read_back("out/mask.mp4")
    assert all((one & two).sum() / (one | two).sum() > 0.8 for one, two in zip(found, truth, strict=True))
    before, after = (list(VideoSource(name)) for name in ("clip.mkv", "out/inpainted.mkv"))
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        changed = (one.rgb != two.rgb).any(2)
        assert changed[truth[number]].mean() > 0.5
        np.testing.assert_array_equal(changed & ~found[number], False)

    assert render(model, "--mask", "out/mask.mp4", "--out", "again") == 0
    again = list(VideoSource("again/inpainted.mkv"))
    assert all(np.array_equal(one.rgb, two.rgb) for one, two in zip(after, again, strict=True))

    assert render(model, "--mask", "box:14,10,26,24@3", "--follow", "--out", "box") == 0
    assert "the object in frame 3" in capsys.readouterr().out
    found = read_back("box/mask.mp4")
    assert all((one & two).sum() / (one | two).sum() > 0.7 for one, two in zip(found, truth, strict=True))


def test_a_box_in_which_nothing_stands_out_is_followed_whole_and_says_so(
    truth: list[np.ndarray], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(model, "--mask", "box:40,34,20,12@0", "--follow", "--dry-run") == 0
    assert "nothing stands out in the box, so all of it is followed in frame 0" in capsys.readouterr().out


def test_what_is_followed_grows_over_its_blurred_edge_unless_told_otherwise() -> None:
    assert MaskRequest(("object.png",), follow=True).growth == 4
    assert MaskRequest(("object.png",), follow=True, dilate=0).growth == 0
    assert MaskRequest(("object.png",), follow=True, invert=True).growth == 0
    assert MaskRequest(("object.png",)).growth == 0
    assert MaskRequest(("object.png",), dilate=3).growth == 3


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["random:0.5"], "takes an object marked in one frame"),
        (["box:10,10,20,20@8"], "the clip has frames 0 to 7"),
        (["missing.png@3"], "there is no such file"),
        (["clip.mkv@3"], "takes an object marked in one frame"),
        ([], "takes an object marked in one frame"),
    ],
)
def test_what_marks_no_object_is_refused(
    truth: list[np.ndarray], model: Path, capsys: pytest.CaptureFixture[str], texts: list[str], says: str
) -> None:
    masks = [part for text in texts for part in ("--mask", text)]
    assert render(model, *masks, "--follow", "--out", "out") in (2, 3)
    assert says in capsys.readouterr().err
    assert not Path("out").exists()


def test_sam_follows_where_its_weights_are_named(
    truth: list[np.ndarray], model: Path, sam_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(truth[3]).save("object.png")
    assert render(model, "--mask", "object.png@3", "--sam", str(sam_folder), "--out", "out") == 2
    assert "add --follow" in capsys.readouterr().err
    assert render(model, "--mask", "object.png@3", "--follow", "--sam", str(sam_folder), "--out", "out") == 0
    assert f"It was followed by {sam_folder}." in capsys.readouterr().out
    frames = [frame.rgb for frame in VideoSource(Path("clip.mkv"))]
    expected = follow_with_sam(load_sam(str(sam_folder)), frames, {3: truth[3]})
    for number, found in enumerate(read_back("out/mask.mp4")):
        assert (found != expected(number)).mean() < 0.01  # the masks of random weights are noise, which a video changes
    assert render(model, "--mask", "box:16,12,20,20@3", "--follow", "--sam", str(sam_folder), "--out", "box") == 0
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[12:32, 16:36] = True
    expected = follow_with_sam(load_sam(str(sam_folder)), frames, {}, {3: box})
    for number, found in enumerate(read_back("box/mask.mp4")):
        assert (found != expected(number)).mean() < 0.01

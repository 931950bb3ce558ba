"""Label propagation: the measures against brute force, the rule by hand, and clips whose masks are known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffmae_video.cli.app import run
from diffmae_video.config import ModelSettings, PropagateSettings
from diffmae_video.data.davis import list_davis
from diffmae_video.data.synthetic import motion_clip_and_mask
from diffmae_video.errors import DataError, UsageError
from diffmae_video.evaluation.propagation import (
    Grid,
    contour_accuracy,
    propagate,
    region_similarity,
    score,
    transfer,
)
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.weights import save_model


def brute_force_contour(mask: np.ndarray) -> set[tuple[int, int]]:
    """Pixels that differ from the one to the right, below, or below and to the right."""
    height, width = mask.shape
    found = set()
    for row, column in itertools.product(range(height), range(width)):
        for down, right in ((0, 1), (1, 0), (1, 1)):
            if row + down < height and column + right < width and mask[row, column] != mask[row + down, column + right]:
                found.add((row, column))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_measures_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(6, 15, 2)
    true = np.zeros((height, width), bool)
    true[1 : height // 2, 2 : width - 1] = True
    found = true ^ (rng.random((height, width)) < 0.15)
    pixels = list(itertools.product(range(height), range(width)))
    both, either = sum(found[p] and true[p] for p in pixels), sum(found[p] or true[p] for p in pixels)
    assert region_similarity(found, true) == pytest.approx(both / either)
    bound = 0.1
    radius = math.ceil(bound * math.hypot(height, width))
    a, b = brute_force_contour(found), brute_force_contour(true)

    def near(one: tuple[int, int], others: set[tuple[int, int]]) -> bool:
        return any((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2 <= radius**2 for other in others)

    precision, recall = sum(near(p, b) for p in a) / len(a), sum(near(p, a) for p in b) / len(b)
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert contour_accuracy(found, true, bound) == pytest.approx(expected)


def test_measures_of_empty_and_equal_masks() -> None:
    empty, full = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    full[2:5, 2:5] = True
    assert region_similarity(empty, empty) == contour_accuracy(empty, empty) == 1
    assert region_similarity(full, full) == contour_accuracy(full, full) == 1
    assert region_similarity(empty, full) == contour_accuracy(empty, full) == 0


def test_scores_leave_out_the_first_and_the_last_frame() -> None:
    right, wrong = np.array([[1, 2], [0, 0]]), np.array([[0, 0], [1, 2]])
    assert score([right, right, right, wrong], [right, right, None, right]) == {1: (1.0, 1.0), 2: (1.0, 1.0)}
    assert score([right, wrong, right], [right, right, right])[1][0] == 0


def by_hand(grid: Grid, sources: list[tuple[Grid, torch.Tensor]], settings: PropagateSettings) -> torch.Tensor:
    height, width = grid.shape
    out = torch.zeros(sources[0][1].shape)
    for row, column in itertools.product(range(height), range(width)):
        pairs = []
        for source, labels in sources:
            for y, x in itertools.product(range(height), range(width)):
                if not settings.radius or max(abs(y - row), abs(x - column)) <= settings.radius:
                    pairs.append((float(grid.features[row, column] @ source.features[y, x]), labels[:, y, x]))
        best = sorted(pairs, key=lambda pair: -pair[0])[: settings.top]
        weights = [math.exp(similar / settings.temperature) for similar, _ in best]
        out[:, row, column] = sum(w * label for w, (_, label) in zip(weights, best, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("radius", [0, 1])
def test_labels_go_from_the_most_similar_patches_of_all_sources(radius: int) -> None:
    from diffmae_video.evaluation.propagation import neighbourhood

    generator = torch.Generator().manual_seed(0)
    settings = PropagateSettings(top=3, radius=radius)

    def grid() -> Grid:
        return Grid(torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=generator), dim=-1))

    sources = [(grid(), torch.rand(2, 3, 4, generator=generator)) for _ in range(2)]
    target = grid()
    near = neighbourhood((3, 4), radius, torch.device("cpu"))
    torch.testing.assert_close(transfer(target, sources, near, settings), by_hand(target, sources, settings))


def colours(frame: torch.Tensor) -> torch.Tensor:
    """Features that tell the object from its background: mean colours of patches of 4 pixels, centred."""
    small = torch.nn.functional.avg_pool2d(frame[None].float(), 4)[0].permute(1, 2, 0)
    return small - small.mean((0, 1))


@pytest.mark.parametrize("label", [0, 2])
def test_the_object_of_the_embedded_data_set_is_followed(label: int) -> None:
    clip, masks = motion_clip_and_mask(label, seed=1, frames=10, size=64)
    frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in clip]
    found = list(propagate(frames, masks[0].astype(int), colours, PropagateSettings()))
    assert len(found) == 10
    ((j, f),) = score(found, [mask.astype(int) for mask in masks]).values()
    assert j > 0.75  # patches of 4 pixels on a disk of 20 to 27 pixels
    still = region_similarity(masks[0], masks[5])
    assert j > still
    assert 0 < f <= 1


def write_davis(folder: Path, videos: int = 2, frames: int = 5) -> Path:
    """A folder in DAVIS layout, of the embedded data set's clips."""
    for number in range(videos):
        clip, masks = motion_clip_and_mask(number, seed=0, index=number, frames=frames, size=64)
        for kind, suffix, pictures in (("JPEGImages", "jpg", clip), ("Annotations", "png", masks)):
            target = folder / kind / "480p" / f"clip{number}"
            target.mkdir(parents=True)
            for index, picture in enumerate(pictures):
                image = Image.fromarray(picture if suffix == "jpg" else picture.astype(np.uint8), None)
                image.save(target / f"{index:05d}.{suffix}")
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("".join(f"clip{number}\n" for number in range(videos)))
    return folder


def test_the_command_measures_writes_and_is_done_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_davis(tmp_path / "davis")
    model = ModelSettings(preset="nano", width=16, depth=1, heads=2, frames=4, size=(32, 32), patch=8)
    save_model(DiffMAE(model), "model")
    words = "eval --task propagate --data davis --checkpoint model --device cpu --set evaluate.propagate.short_side=64"
    assert run([*words.split(), "--dry-run"]) == 0
    assert not Path("runs").exists()
    assert run([*words.split(), "--out", "out"]) == 0
    report = json.loads(Path("out/eval.json").read_text())
    assert report["videos"] == {"used": 2, "frames": 10, "objects": 2}
    truth, found = ([np.asarray(Image.open(folder / f"clip1/{n:05d}.png")) for n in range(5)]
                    for folder in (Path("davis/Annotations/480p"), Path("out/masks")))  # fmt: skip
    assert (truth[0] == found[0]).all()
    assert report["objects"]["clip1/1"] == pytest.approx(list(score(found, truth)[1]))
    assert report["j_and_f"] == pytest.approx(np.mean(list(report["objects"].values())))
    assert Path("out/sheet.png").stat().st_size
    assert "data:image/png" in Path("out/report.html").read_text()
    assert run([*words.split(), "--out", "out"]) == 0
    assert "done before" in capsys.readouterr().out
    for extra, said in (("--masks center", "--masks center is for --task inpaint"), ("--nproc 2", "one process")):
        assert run([*words.split(), *extra.split()]) == 2
        assert said in capsys.readouterr().err


def test_folders_that_are_not_davis_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no JPEGImages/480p"):
        list_davis(tmp_path)
    folder = write_davis(tmp_path / "davis", 1)
    with pytest.raises(UsageError, match=r"has no ImageSets/2017/test\.txt \(it has lists for: val\)"):
        list_davis(folder, "test")
    Image.new("RGB", (64, 64)).save(folder / "Annotations/480p/clip0/00001.png")
    with pytest.raises(DataError, match="a mask holds one number a pixel"):
        list_davis(folder)[0].mask(1)
    (folder / "Annotations/480p/clip0/00000.png").unlink()
    with pytest.raises(DataError, match=r"00000\.png is missing"):
        list_davis(folder)
    (folder / "ImageSets/2017/val.txt").write_text("../clip0\n")
    with pytest.raises(DataError, match="no name of a video"):
        list_davis(folder)

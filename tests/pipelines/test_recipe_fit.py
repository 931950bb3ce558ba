"""`diffmae recipes fit`: the largest model that memory, data and hours allow."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from diffmae_video.config import Settings, load_settings, recipe_names
from diffmae_video.data.manifest import Manifest, ShardInfo, write_manifest
from diffmae_video.errors import UsageError
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.recipe_fit import CANDIDATES, Candidate, fit_recipe, print_fit
from diffmae_video.training.footprint import Footprint

THREE = (Candidate("video-tiny"), Candidate("video-base", (), 50), Candidate("video-large", (), 200))
SIZE = {"tiny": 1, "base": 10, "large": 100}


def measured(settings: Settings, clips: int) -> Footprint:
    """A cost that grows with the preset: 1 GiB and 1 TFLOP a clip for tiny."""
    size = SIZE[settings.model.preset]
    return Footprint(size, size, size * 3e11, size * 1e12, 0, 0, int(size * 2**30 * (1 + clips / 64)))


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    rows = [
        {
            "key": f"k{n}",
            "label": -1,
            "offset": 512 * n,
            "size": 1,
            "suffix": "mp4",
            "frames": 9,
            "fps": 9.0,
            "width": 8,
        }
        | {"height": 8, "media": str(n)}
        for n in range(100)
    ]
    (tmp_path / "train-000000.tar").write_bytes(b"x")
    info = ShardInfo("train-000000.tar", "train", 1, "0" * 64, len(rows))
    return write_manifest(tmp_path, dataset="mine", kind="video", classes=[], shards=[(info, rows)])


def choose(shards: Manifest, memory: str = "1000GiB", hours: float | None = None, tflops: float = 1000.0) -> str:
    job = Job(data=shards.root, device="cpu", device_memory=memory, dry_run=True)
    return fit_recipe(job, hours, tflops, candidates=THREE, measured=measured)[0].candidate.recipe


def test_memory_data_and_hours_bound_the_model(shards: Manifest) -> None:
    assert choose(shards) == "video-base"  # 100 clips are too few for the large one
    assert choose(shards, memory="4GiB") == "video-tiny"
    base = 400 * 100 * 4 * 10e12 / (1000e12 * 0.4) / 3600  # passes, clips, repeats, FLOPs, 40% of the peak
    assert choose(shards, hours=base / 3) == "video-base"
    assert choose(shards, hours=base / 5) == "video-tiny"  # less than a quarter of the recipe's length
    with pytest.raises(UsageError, match=r"Not even video-tiny fits into 0\.0 GiB"):
        choose(shards, memory="4MiB")


def test_the_proposed_command_is_one_and_says_the_length(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(data=shards.root, device="cpu", device_memory="1000GiB", dry_run=True)
    chosen, found = fit_recipe(job, 0.4, 1000.0, candidates=THREE, measured=measured)
    assert chosen.epochs == pytest.approx(400 * 0.4 / (400 * 100 * 4 * 10e12 / (1000e12 * 0.4) / 3600), rel=0.05)
    print_fit(chosen, found, "shards", 0.4)
    shown = capsys.readouterr().out
    assert "wants 200 samples" in shown
    words = shlex.split(shown.strip().splitlines()[-1])
    assert words[:7] == ["diffmae", "pretrain", "--video", "--data", "shards", "--recipe", "video-base"]
    assert load_settings("video-base", "pretrain", [words[-1]]).train.epochs == chosen.epochs


def test_a_small_set_gets_a_batch_that_it_fills_and_is_told_what_to_expect(
    shards: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(data=shards.root, device="cpu", device_memory="1000GiB", dry_run=True)
    chosen, found = fit_recipe(job, 3.0, 1000.0, candidates=(Candidate("videomae-base"),), measured=measured)
    assert chosen.settings.train.batch_size > 100
    assert chosen.batch == 64
    print_fit(chosen, found, "shards", 3.0)
    shown = capsys.readouterr().out
    assert f"--set train.batch_size={chosen.batch}" in shown.splitlines()[-1]
    assert "Note: these hours allow --set train.epochs=3200;" in shown
    assert "Note: 100 samples are few" in shown


def test_candidates_are_recipes_in_ascending_order() -> None:
    for kind, candidates in CANDIDATES.items():
        assert [one.samples for one in candidates] == sorted(one.samples for one in candidates)
        for one in candidates:
            assert one.recipe in recipe_names()
            assert (load_settings(one.recipe, "pretrain", one.set).model.frames == 1) == (kind == "image")

"""The commands of the documentation run, page by page and in their order, on small data.

Files that a page speaks of lie in the folder; a page that does not begin with raw data finds shards and runs there.
Words are added that make a command small (`SMALL`); a few stand for something else here (`INSTEAD`), and what needs a
cluster, a hub or files of others is named in `NOT_RUN`. tests/test_docs.py parses all of them.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from diffmae_video.cli.app import run
from diffmae_video.data.synthetic import encode_mp4, motion_clip, write_demo_data
from tests.pages import shell_lines

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FROM_RAW = ("README.md", "docs/data.md", "docs/howto/hold-out.md", "docs/tutorials/")
"""Pages that make their shards themselves."""
NOT_RUN = {
    "torchrun": "several machines",
    "hf:": "a hub",
    "timm:": "a hub",
    ".pth": "files of other projects; tests/models/ imports such",
    "--init models/": "files of other projects",
    "study run smoke --data demo=shards/demo": "a minute; tests/integration/test_study.py runs it",
    "study table": "that study",
    "--format hf": "a classifier of VideoMAE's form; tests/models/ exports one",
    "diffmae studio": "a server that does not end; tests/studio/ has its own",
    "--data DAVIS": "a data set; tests/evaluation/test_propagation.py has its layout",
}
INSTEAD = {  # of the documentation: what is run
    "shard kinetics/ out/": "shard kinetics/ out/ --dataset k400",
    "shard kinetics/ shards/": "shard kinetics/ shards/ --dataset k400",
    "shard mine/ shards/": "shard mine/ shards-mine/",  # the other branch of that page
    "--nproc 8": "--nproc 2",
    "/shared/run": "shared/run",
    "--task mine": "--task k400",
    "--fit 2m": "--fit 2steps",
}
BEFORE = {"compare runs/eval-001 runs/eval-002": "eval --task k400 --views 2x1"}
"""What a page leaves to the reader."""
_NANO = (
    "model.preset=nano model.width=32 model.depth=1 model.heads=2 model.decoder_depth=1 model.decoder_width=32 "
    "model.decoder_heads=2 model.frames=8 model.size=[16,16] model.patch=8"
)
_SHORT = "train.steps=2 train.batch_size=4 train.warmup_epochs=0 train.picture_every=0 data.workers=0 data.repeats=1"
SMALL = {
    "pretrain": f"{_NANO} {_SHORT}",
    "finetune": f"{_SHORT} train.layer_decay=1.0 train.ema=0.0",
    "eval": "data.workers=0 evaluate.bootstrap=3 evaluate.clips=2 evaluate.samples=1 render.steps=2",
    "features": "data.workers=0",
    "render-inpaint": "render.steps=2 render.fit=2steps",
    "loss-sweep": "data.workers=0",
}


def commands(page: Path) -> list[str]:
    """Each `diffmae ...` line of the page's blocks, from `diffmae` on unless something stands before it."""
    return [text for text in map(shlex.join, shell_lines(page)) if "diffmae " in text]


def small(text: str) -> list[str]:
    """The words that are run for a line of the documentation."""
    for old, new in INSTEAD.items():
        text = text if new in text else text.replace(old, new)
    words = shlex.split(text)[1:]
    for setting in SMALL.get(words[0], "").split():
        if setting.partition("=")[0] not in " ".join(words):
            words += ["--set", setting]
    planned = "--device" in words
    return words if planned or words[0] not in SMALL else [*words, "--device", "cpu"]


def raw_files(folder: Path) -> None:
    """Everything that pages take for given: folders of clips, one clip, masks of it."""
    for number in range(24):
        label = number % 2
        clip = motion_clip(label, seed=1, index=number, frames=12)
        data, split = encode_mp4(clip, 10), "train" if number < 16 else "val"
        for place in (f"clips/{split}", f"mine/{split}/class {label}", "similar-clips"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"clip{number:03d}.mp4").write_bytes(data)
    write_demo_data(folder / "kinetics", train=16, val=8, frames=12, workers=1)
    drawn = motion_clip(2, seed=0, frames=60)  # 6 seconds, as large as the boxes that pages name
    clip = np.stack([cv2.resize(frame, (400, 144)) for frame in drawn])
    mask = np.zeros(clip.shape[:3], bool)
    mask[:, 50:80, 180:220] = True
    for name in ("clip.mp4", "holiday.mp4", "clips/val/other.mp4"):
        (folder / name).write_bytes(encode_mp4(clip, 10))
    grey = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=3)
    (folder / "object.mp4").write_bytes(encode_mp4(grey, 10))
    Image.fromarray(grey[0]).save(folder / "object.png")
    np.save(folder / "mask.npy", mask)
    (folder / "frames").mkdir()
    for index, frame in enumerate(clip[:12]):
        Image.fromarray(frame).save(folder / "frames" / f"{index:03d}.png")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    raw_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["shard", "mine", "other", "--copy"]) == 0
    for name in ("manifest.json", "samples.parquet", "run.json"):  # tars of somebody else
        (folder / "other" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ".diffmae")
    return folder


@pytest.fixture(scope="module")
def ready(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which shards, a pre-training, a classifier and two tests of it lie."""
    folder = tmp_path_factory.mktemp("made") / "ready"
    shutil.copytree(raw, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        images = [
            "shard frames imagenet-shards --image --val-fraction 0",
            "shard kinetics k400-shards --copy --dataset k400",
            "shard kinetics shards/demo --copy --dataset demo",
            "shard kinetics shards --copy --dataset k400",
        ]
        chain = ["pretrain", "finetune --task k400", "eval --task k400 --views 1x1", "eval --task k400 --views 2x1"]
        for text in (*images, *chain):
            assert run(small(f"diffmae {text}")) == 0, text
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_run(
    page: Path, raw: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(page.relative_to(ROOT))
    start = raw if name.startswith(FROM_RAW) else request.getfixturevalue("ready")
    place = tmp_path / "place"
    shutil.copytree(start, place)
    for record in place.glob(".diffmae/workspace.json"):
        record.write_text(record.read_text().replace(str(start), str(place)))
    monkeypatch.chdir(place)
    text = page.read_text("utf-8")
    for file, body in re.findall(r"```toml\n# (\S+\.toml)\n(.*?)```", text, re.S):
        Path(file).write_text(body)
    for body in re.findall(r"```python\n(.*?)```", text, re.S):
        if "open(folder" in body:  # it makes the table that the next command reads
            exec(body, {})
    ran = 0
    for line in commands(page):
        if any(part in line for part in NOT_RUN):
            continue
        if line.removeprefix("diffmae ") in BEFORE:
            assert run(small(f"diffmae {BEFORE[line.removeprefix('diffmae ')]}")) == 0
        words = small(line)
        assert run(words) == 0, (line, shlex.join(words))
        ran += 1
    for body in re.findall(r"```python\n(.*?)```", text, re.S):
        if "load_file(" in body:  # it reads what a command wrote
            exec(body, {})
    assert ran or any(part in text for part in NOT_RUN)


def test_what_is_not_run_is_still_there() -> None:
    lines = [line for page in PAGES for line in commands(page)]
    for part in (*NOT_RUN, *INSTEAD, *BEFORE):
        assert any(part in line for line in lines), f"{part} is in no page any more"
    skipped = [line for line in lines if any(part in line for part in NOT_RUN)]
    assert len(skipped) < len(lines) / 3

"""Does what is filled move as the label says, and is the label under which a clip is denoised best its own?

    diffmae demo-data CLIPS --train 4000 --val 400 --size 32 --frames 20
    diffmae shard CLIPS SHARDS --dataset demo --copy
    diffmae pretrain --recipe demo --data SHARDS --out PRE --set model.labels=data --set model.frames=8 \
        --set model.tubelet=1 --set data.stride=2 --set mask.kind=future --set mask.ratio=0.875 \
        --set 'mask.mix=[{kind="random",ratio=0.9},{kind="future",ratio=0.5,weight=0.5}]' \
        --set train.steps=8000 --set train.base_lr=1.6e-2 --set train.ema=0.999
    diffmae finetune --task demo --recipe demo --data SHARDS --init PRE --out CLASSIFIER --set data.label_fraction=1.0 \
        --set train.steps=1500 --set model.frames=8 --set data.stride=2
    python benchmarks/labels.py --model PRE --classifier CLASSIFIER --data SHARDS

Of each validation clip the last frames are hidden, and filled under a label that is not its own, drawn by seed. The
classifier, trained on real clips alone, looks at the hidden frames and the last visible
one. `agrees` is how often it finds the label that was asked for (`agrees of directions`: where that is one of the four
directions), `own` how often that of the clip; chance is 1 of 8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch
from inpainting import RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffmae_video.config import with_overrides
from diffmae_video.data.stream import build_stream
from diffmae_video.files import write_atomic
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import grid_shape
from diffmae_video.pipelines.classifiers import Loaded, load, load_classifier

GUIDANCE = (1.0, 2.0, 5.0)
RATIOS = (0.875, 0.5)
STEPS = (1, 3, 10)
SHOWN = (
    ("moving left", "moving right", "moving up", "moving down"),
    ("turning clockwise", "turning counterclockwise", "zooming in", "zooming out"),
)
"""Labels in the picture, by column."""


def main() -> None:
    """Measure, print, keep in benchmarks/results/labels.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--picture", type=Path, help="draw two clips under each label here, and measure nothing")
    asked = parser.parse_args()
    device = torch.device("cpu")
    loaded, judge = load(asked.model, device), load_classifier(asked.classifier, device)
    clips, labels, seeds = read(loaded, asked.data, asked.clips)
    if asked.picture:
        draw(loaded, clips[: len(SHOWN)], seeds, asked.picture)
        return
    count = int(loaded.model.settings.labels)
    generator = torch.Generator().manual_seed(0)
    wanted = (labels + torch.randint(1, count, labels.shape, generator=generator)) % count
    names = loaded.info["classes"]
    straight = torch.tensor([names[label].startswith("moving") for label in wanted.tolist()])
    rows = []
    for ratio in RATIOS:
        first = clips.shape[1] - round(ratio * clips.shape[1])  # of the hidden frames
        true = classify(judge, clips[:, first - 1 :])
        rows.append({"hidden": ratio, "real clips": float((true == labels).float().mean())})
        show(rows[-1])
        for steps in STEPS:
            for guidance in (0.0, *GUIDANCE):
                made = fill(loaded, clips, wanted, seeds, ratio, guidance, steps)
                found = classify(judge, made[:, first - 1 :])
                agrees, own = (float((found == one).float().mean()) for one in (wanted, labels))
                row = {"hidden": ratio, "steps": steps, "guidance": guidance, "agrees": agrees, "own": own}
                rows.append(row | {"agrees of directions": float((found == wanted)[straight].float().mean())})
                show(rows[-1])
    rows = [{name: round(value, 4) for name, value in row.items()} for row in rows]
    write_atomic(RESULTS / "labels.json", json.dumps({"clips": len(clips), "rows": rows}, indent=1) + "\n")


def draw(loaded: Loaded, clips: Tensor, seeds: Tensor, path: Path) -> None:
    """One column of rows a clip: the source, then what a model makes of its first frame under some labels."""
    names = list(loaded.info["classes"])
    columns = []
    for number, labels in enumerate(SHOWN):
        one = clips[number : number + 1]
        wanted = torch.tensor([names.index(label) for label in labels])
        seed = seeds[number : number + 1].expand(len(labels))
        made = fill(loaded, one.expand(len(labels), -1, -1, -1, -1), wanted, seed, RATIOS[0], 2.0, 3)
        rows = [*one, *made]
        columns.append((["source", *labels], torch.stack(rows).permute(0, 1, 3, 4, 2).numpy()))
    picture = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(len(SHOWN[0]) + 1, len(SHOWN))
    for column, (titles, strips) in enumerate(columns):
        for row, (title, strip) in enumerate(zip(titles, strips, strict=True)):
            place = axes[row][column]
            place.imshow(
                np.concatenate([np.pad(frame, ((0, 0), (1, 1), (0, 0)), constant_values=255) for frame in strip], 1)
            )
            place.set_ylabel(title.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
            place.set(xticks=[], yticks=[])
    picture.savefig(path)


def show(row: dict[str, Any]) -> None:
    """One line."""
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)


def read(loaded: Loaded, data: str, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Validation clips uint8 (B, T, C, H, W), their labels and seeds."""
    settings = with_overrides(loaded.settings, data={"path": str(Path(data)), "workers": 0})
    stream = build_stream(settings, split="val", batch_size=50, training=False)
    batches = []
    for batch in stream:
        batches.append(batch)
        if sum(len(one.clips) for one in batches) >= limit:
            break
    clips, labels, seeds = (torch.cat([getattr(one, name) for one in batches]) for name in ("clips", "labels", "seeds"))
    return clips[:limit], labels[:limit], seeds[:limit]


def fill(
    loaded: Loaded, clips: Tensor, wanted: Tensor, seeds: Tensor, ratio: float, guidance: float, steps: int
) -> Tensor:
    """The clips with their last frames filled under the wanted labels, uint8."""
    model, made = loaded.model, []
    assert isinstance(model, DiffMAE)
    frames, _, height, width = clips.shape[1:]
    shape = grid_shape(frames, height, width, model.tubelet, model.patch)
    for start in range(0, len(clips), 50):
        part = slice(start, start + 50)
        pixels = loaded.prepare(clips[part])
        mask = make_mask("future", ratio, shape, seeds[part])
        with loaded.autocast():
            filled = model.sample(
                pixels, mask, seeds=seeds[part], labels=wanted[part], guidance=guidance, steps=steps, sampler="ddim"
            )
        made.append(((filled.float().clamp(-1, 1) + 1) * 127.5).round().byte().transpose(1, 2))
    return torch.cat(made)


@torch.no_grad()
def classify(judge: Loaded, clips: Tensor) -> Tensor:
    """Classes that the judge finds in clips uint8 (B, T, C, H, W)."""
    return torch.cat([judge.probabilities(part).argmax(1) for part in clips.split(50)])


if __name__ == "__main__":
    main()

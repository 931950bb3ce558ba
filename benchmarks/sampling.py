"""What more sampling steps buy: distances of 1, 3, 10 and 50 steps against clips seen in training, by parametrisation.

    python benchmarks/sampling.py layout REAL FOLDERS && diffmae shard FOLDERS SHARDS --short-side 56 --crf 18
    python benchmarks/sampling.py train plain --data SHARDS --out WORK/plain       # likewise pca, flow-velocity
    python benchmarks/sampling.py curve --runs WORK/* --data SHARDS                # every checkpoint of MARKS
    python benchmarks/sampling.py grid --runs WORK/pca --data SHARDS --seeds 3     # all samplers, newest checkpoint
    python benchmarks/sampling.py errors --runs WORK/* --data SHARDS               # x_0 error by amount of noise
    python benchmarks/sampling.py plot

`curve` and `errors` add to benchmarks/results/sampling.json, `grid` to sampling-grid.json (more clips), and skip what
stands there already, so all can be stopped and run again. All models have the same encoder, decoder, order of clips,
masks and seeds; figures are those of the moving average of the weights. The learning rate is constant after the
warm-up, so that a checkpoint stands for a training of its length. Held-out clips: tennis7 and jhmdb by their splits,
four of clips/. Rows of the arm `skip` are of a target that lost and was removed (docs/decisions.md).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import diffmae_video.compat  # noqa: F401

import numpy as np
import torch
from inpainting import MASKS, RESULTS, filled, load_diffmae, show
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffmae_video.config import read_settings, with_overrides
from diffmae_video.data.stream import build_stream
from diffmae_video.evaluation.image_metrics import psnr, psnr_of
from diffmae_video.evaluation.inpainting import DeepFeatures, cosine_distance, frechet_distance, to_frames
from diffmae_video.files import write_atomic
from diffmae_video.masking import parse_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import gather_tokens, normalize_pixels, patchify
from diffmae_video.models.space import PatchSpace
from diffmae_video.training.checkpoint import list_checkpoints, load_tensors, read_checkpoint

HELD_OUT = (
    "hiera_goat",
    "k400_arm_wrestling_ehLnj7pXnYE",
    "tv_k400_SOX5yA1l24A",
    "tv_ucf101_v_SoccerJuggling_g23_c01",
)
MARKS = (400, 800, 1600, 2400, 3200, 4800, 6400, 12800)
"""Optimizer steps of 16 clips at which the curve is measured."""
SETTINGS = [
    *("model.preset=nano", "model.frames=8", "model.size=[32,32]", "model.tubelet=2", "model.patch=4"),
    *("model.positions=rotary", "model.decoder_depth=2", "model.decoder_width=192", "model.decoder_heads=6"),
    *("model.target=pixel", "model.space=pixel", "diffusion.rho=1.0", "diffusion.draw=angle"),
    'mask.mix=[{kind="tube",ratio=0.75,weight=0.75},{kind="center",ratio=0.25,weight=0.5}]',
    *("data.workers=0", "train.batch_size=16", "train.base_lr=1.6e-2", "train.min_lr=1e-3", "train.steps=12800"),
    *("train.warmup_epochs=2", "train.precision=bf16", "train.checkpoint_every=400", "train.keep_every=400"),
    *("train.keep_last=1", "train.picture_every=0", "train.log_every=50"),
]
ARMS: dict[str, list[str]] = {
    "plain": [],
    "pca": ["model.space=pca:32"],
    "flow-velocity": ["diffusion.schedule=flow", "model.target=velocity"],
}
CURVE = [("ddim", steps) for steps in (1, 3, 10, 50)]
GRID = [(sampler, steps) for steps in (2, 3, 5, 10, 20, 50) for sampler in ("ddim", "dpm++", "heun", "ddpm")]
LONG = [("ddim", 250), ("ddpm", 250), ("ddpm", 1000)]
"""Measured with one seed."""
MEANS = [("ddim", 10), ("ddpm", 50)]
"""Of which the mean of 16 samples is measured."""
SHARES = {"jhmdb": 22, "tennis": 22, "clips": 4}
"""Held-out clips by folder, evenly spread, for `curve` and `errors`."""
GRID_SHARES = {"jhmdb": 30, "tennis": 30, "clips": 4}
FILE, GRID_FILE = RESULTS / "sampling.json", RESULTS / "sampling-grid.json"
FRAME_STEP = 4  # of the frames of a clip, every fourth one is described by features


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    layout = stages.add_parser("layout")
    layout.add_argument("source", type=Path)
    layout.add_argument("target", type=Path)
    training = stages.add_parser("train")
    training.add_argument("arm", choices=ARMS)
    training.add_argument("--data", required=True)
    training.add_argument("--out", type=Path, required=True)
    for name in ("curve", "grid", "errors"):
        stage = stages.add_parser(name)
        stage.add_argument("--runs", type=Path, nargs="+", required=True)
        stage.add_argument("--data", required=True)
        stage.add_argument("--seeds", type=int, default=1)
    picture = stages.add_parser("plot")
    picture.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs" / "sampling.png")
    options = parser.parse_args()
    if options.stage == "layout":
        lay_out(options.source, options.target)
    elif options.stage == "train":
        train(options.arm, options.data, options.out)
    elif options.stage == "plot":
        plot(read_rows(), options.out)
    elif options.stage == "errors":
        measure_errors(options.runs, options.data)
    else:
        measure(options.runs, options.data, options.seeds, whole=options.stage == "grid")


def lay_out(source: Path, target: Path) -> None:
    """Links to the clips of tennis7/ and jhmdb/ by their splits, hockey/ and clips/ but for HELD_OUT, as
    SPLIT/FOLDER/NAME."""
    places: dict[Path, Path] = {}
    for folder, name in (("tennis7", "tennis"), ("jhmdb", "jhmdb")):
        with open(source / folder / "splits.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                places[source / folder / row["path"]] = target / row["split"] / name / row["path"].replace("/", "_")
    for clip in sorted((source / "hockey").glob("*.mp4")):
        places[clip] = target / "train" / "hockey" / clip.name
    for clip in sorted((source / "clips").iterdir()):
        places[clip] = target / ("val" if clip.stem in HELD_OUT else "train") / "clips" / clip.name
    for clip, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.symlink(clip.resolve(), place)


def train(arm: str, data: str, out: Path) -> None:
    """Pre-train one arm; the same command again continues it."""
    from diffmae_video.pipelines.job import Job
    from diffmae_video.pipelines.pretrain import pretrain

    pretrain(Job(recipe="inpaint-tiny", data=data, out=out, overrides=(*SETTINGS, *ARMS[arm])))


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(runs: list[Path], data: str, seeds: int, *, whole: bool) -> None:
    """Add rows to the file: for each checkpoint in question, mask, sampler and number of steps."""
    file, shares = (GRID_FILE, GRID_SHARES) if whole else (FILE, SHARES)
    clips = held_out(runs[0], data, shares)
    sources = to_frames(clips)
    features = DeepFeatures()
    originals = [features(clip[::FRAME_STEP]) for clip in sources]
    rows = read_rows(file=file)
    done = {key(row) for row in rows}
    for run in runs:
        marks = [mark for mark in MARKS if checkpoint(run, mark) is not None]
        for mark in marks[-1:] if whole else marks:
            model = averaged(run, mark)
            for text, (sampler, steps, samples, seed) in plan_of(seeds, whole=whole, last=mark == marks[-1]):
                row: dict[str, Any] = {"arm": run.name.removeprefix("run-"), "clips_seen": mark * 16}
                row |= {"mask": text, "sampler": sampler, "steps": steps, "samples": samples, "seed": seed}
                if key(row) in done:
                    continue
                row |= figures(model, clips, sources, originals, features, row)
                done.add(key(row))
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                write(file, shares, rows=rows)
    show([{name: row.get(name) for name in SHOWN} for row in rows])


def plan_of(seeds: int, *, whole: bool, last: bool) -> list[tuple[str, tuple[str, int, int, int]]]:
    """What is measured of a checkpoint: (mask, (sampler, steps, samples, seed)), what matters most first."""
    masks = MASKS if whole or last else MASKS[:2]
    pairs = list(dict.fromkeys(CURVE + GRID if whole else CURVE))
    groups = [[(*pair, 1, seed) for pair in pairs] for seed in range(seeds)]
    if whole:
        groups[1:1] = [[(*pair, 16, 0) for pair in MEANS], [(*pair, 1, 0) for pair in LONG]]
    return [(text, one) for group in groups for text in masks for one in group]


SHOWN = ("arm", "clips_seen", "mask", "sampler", "steps", "samples", "seed", "psnr", "features", "frechet")


def figures(
    model: DiffMAE,
    clips: Tensor,
    sources: np.ndarray,
    originals: list[np.ndarray],
    features: DeepFeatures,
    row: dict[str, Any],
) -> dict[str, float]:
    """PSNR of the hidden pixels, of one sample or the mean of several; of one also distances of its features, with
    the standard error of their mean over clips."""
    many = row["samples"] > 1
    chosen = slice(0, None, 4) if many else slice(None)  # a mean of samples needs fewer clips: no distances
    clips, sources = clips[chosen], sources[chosen]
    seeds = [row["seed"] * 1000 + number for number in range(len(clips))]
    mask = parse_mask(row["mask"], model.encoder.shape, model.tubelet, model.patch)(seeds)
    hidden = mask.pixels(model.tubelet, model.patch).numpy()
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        made = [
            filled(model, clips, mask, row["sampler"], row["steps"], seeds=[number * 1000 + seed for seed in seeds])
            for number in range(row["samples"])
        ]
    seconds = (time.perf_counter() - begun) / len(clips) / row["samples"]
    if many:
        single = [psnr(sources, one, hidden) for one in made]
        mean = np.mean([one.astype(np.float32) for one in made], axis=0)
        error = (mean - sources)[np.broadcast_to(hidden[..., None], mean.shape)]
        with torch.autocast("cpu", torch.bfloat16):
            first = psnr(sources, filled(model, clips, mask, "ddim", 1, seeds=seeds), hidden)
        found = {"psnr": psnr_of(float((error**2).mean())), "psnr_single": float(np.mean(single))}
        return {**found, "psnr_first_step": first, "seconds": seconds}
    described = [features(clip[::FRAME_STEP]) for clip in made[0]]
    distances = [cosine_distance(a, b).mean() for a, b in zip(originals, described, strict=True)]
    return {
        "psnr": psnr(sources, made[0], hidden),
        "features": float(np.mean(distances)),
        "features_error": float(np.std(distances, ddof=1) / len(distances) ** 0.5),
        "frechet": frechet_distance(np.concatenate(originals), np.concatenate(described)),
        "seconds": seconds,
    }


def held_out(run: Path, data: str, shares: dict[str, int]) -> Tensor:
    """Clips of the validation split, evenly spread in each folder: uint8 (B, T, C, H, W)."""
    settings = with_overrides(read_settings(run / "config.toml"), data={"path": data, "sources": [], "workers": 0})
    stream = build_stream(settings, split="val", batch_size=8, training=False)
    batches = list(stream)
    stream.close()
    clips, labels = torch.cat([batch.clips for batch in batches]), torch.cat([batch.labels for batch in batches])
    chosen: list[int] = []
    classes = sorted(json.loads((Path(data) / "manifest.json").read_text())["classes"])
    for name, count in shares.items():
        places = torch.nonzero(labels == classes.index(name)).flatten()
        chosen += places[np.linspace(0, len(places) - 1, count).round().astype(int)].tolist()
    return clips[chosen]


def checkpoint(run: Path, mark: int) -> Path | None:
    """The checkpoint of a run after `mark` steps, if it is kept."""
    return next((path for path in list_checkpoints(run / "checkpoints") if int(path.name.split("-")[1]) == mark), None)


def averaged(run: Path, mark: int) -> DiffMAE:
    """The model of a checkpoint, with the moving average of its weights."""
    model, path = load_diffmae(run).eval(), checkpoint(run, mark)
    assert path is not None
    names = dict(model.named_parameters())
    everything = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in names.items():
        everything[f"ema.{name}"] = parameter.detach().clone()
        for slot in ("exp_avg", "exp_avg_sq"):
            everything[f"optimizer.{name}.{slot}"] = parameter.detach().clone()
        everything[f"optimizer.{name}.step"] = torch.zeros(())
    load_tensors(read_checkpoint(path), everything, 1)
    model.load_state_dict({name: everything[f"model.{name}"] for name in model.state_dict()})
    model.load_state_dict({name: everything[f"ema.{name}"] for name in names}, strict=False)
    return model


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return tuple(row[name] for name in SHOWN[:7])


def read_rows(name: str = "rows", file: Path = FILE) -> list[dict[str, Any]]:
    """Rows measured so far."""
    return json.loads(file.read_text(encoding="utf-8")).get(name, []) if file.exists() else []


def write(file: Path, shares: dict[str, int], **tables: list[dict[str, Any]]) -> None:
    """The file, whole, with these tables in place of what it had of them."""
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "held_out_clips": sum(shares.values())}
    parts = [f'"facts": {json.dumps(facts)}', f'"settings": {json.dumps(SETTINGS)}']
    for name in ("rows", "errors") if file == FILE else ("rows",):
        rows = [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
            for row in tables.get(name, read_rows(name, file))
        ]
        parts.append(f'"{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]")
    write_atomic(file, "{" + ",\n ".join(parts) + "}\n")


# --- error by amount of noise ----------------------------------------------------------------------------------------


def measure_errors(runs: list[Path], data: str) -> None:
    """Mean squared error of x_0 on hidden patches at `random:0.75`, by the angle between clean and noise, beside that
    of the best linear guess, which knows the deviation of every principal component and sees only the patch's own x_t.
    """
    clips = normalize_pixels(held_out(runs[0], data, SHARES), "symmetric")
    rows = read_rows("errors")
    done = {(row["arm"], row["clips_seen"], row["timestep"]) for row in rows}
    for run in runs:
        for mark in MARKS:
            if checkpoint(run, mark) is None:
                continue
            model = averaged(run, mark)
            mask = parse_mask(MASKS[0], model.encoder.shape, model.tubelet, model.patch)(range(len(clips)))
            patches = patchify(clips, model.tubelet, model.patch)
            guess = PatchSpace(f"pca:{model.patch_values}", model.patch_values)
            guess.estimate([patches])
            truth = gather_tokens(patches, mask.masked)
            noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
            for timestep in model.schedule.respace(9).timesteps.tolist():
                if (run.name.removeprefix("run-"), mark * 16, timestep) in done:
                    continue
                signal, sigma = float(model.signal[timestep]), float(model.sigma[timestep])
                spread = guess.deviation
                left = float((spread * sigma / torch.hypot(signal * spread, torch.tensor(sigma))).square().mean())
                space = model.space
                with torch.inference_mode():
                    x_0 = space.from_pixels(truth)
                    drawn = noise.clone()
                    drawn[..., space.noised :] = 0
                    levels = space.levels(torch.tensor(signal).view(1, 1, 1), torch.tensor(sigma).view(1, 1, 1))
                    noisy = levels[0] * x_0 + levels[1] * drawn
                    found = space.to_pixels(
                        model.denoise(noisy, torch.full((len(clips),), timestep), model.encode(clips, mask))
                    )
                row = {"arm": run.name.removeprefix("run-"), "clips_seen": mark * 16, "timestep": timestep}
                row |= {"sigma": sigma, "error": float((found - truth).square().mean()), "linear_guess": left}
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
            write(FILE, SHARES, errors=rows)
    show(rows)


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Feature and Frechet distance by clips seen, a panel for each arm, a curve for each number of DDIM steps, at the
    first of MASKS."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(3.2 * len(arms), 5.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(arms), sharex=True, sharey="row", squeeze=False)
    for column, arm in enumerate(arms):
        for line, (name, title) in enumerate((("features", "feature distance"), ("frechet", "Frechet distance"))):
            panel = axes[line][column]
            for (sampler, steps), colour in zip(CURVE, ("0.5", "tab:green", "tab:blue", "tab:red"), strict=True):
                points: dict[int, list[float]] = {}
                for row in rows:
                    wanted = (arm, MASKS[0], sampler, steps, 1)
                    if tuple(row[part] for part in ("arm", "mask", "sampler", "steps", "samples")) == wanted:
                        points.setdefault(row["clips_seen"], []).append(row[name])
                x = sorted(points)
                y = [float(np.mean(points[seen])) for seen in x]
                panel.plot(x, y, "o-", color=colour, label=f"{steps} step" + "s" * (steps > 1), markersize=4)
            panel.set_xscale("log")
            panel.set_xticks([6400, 25600, 102400], ["6,400", "25,600", "102,400"])
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
            if line == 0:
                panel.set_title(arm)
            else:
                panel.set_xlabel("clips seen in training")
            if column == 0:
                panel.set_ylabel(title)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"DDIM on held-out real clips, {MASKS[0]}; lower is better", fontsize=10)
    figure.savefig(out)


if __name__ == "__main__":
    main()

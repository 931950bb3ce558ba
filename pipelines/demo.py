"""`diffmae demo-data` and `diffmae demo`: the embedded data set, and the whole chain on it with a proof at the end."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video._version import __version__
from diffmae_video.config import load_settings
from diffmae_video.errors import UsageError
from diffmae_video.files import write_atomic
from diffmae_video.pipelines import console
from diffmae_video.pipelines.job import Job

if TYPE_CHECKING:
    from diffmae_video.data.synthetic import DemoData

_MODELS = {"pretrained": "pretrain", "scratch": "scratch"}  # fine-tuned model -> where its weights start


@dataclass(frozen=True)
class DemoResult:
    """What the demo proved."""

    directory: Path
    top1: dict[str, float]
    """Fraction of validation clips whose motion was named, by model: `pretrained`, `scratch`."""
    chance: float
    psnr: dict[str, dict[str, float]]
    """Mask -> method -> PSNR of the masked pixels, dB."""
    seconds: dict[str, float]
    """Wall time by stage."""
    peak_memory: int
    """Bytes resident at most in this process (its workers have their own)."""
    files: dict[str, Path]
    """What to look at."""


def demo_data(
    directory: Path,
    *,
    train: int = 4000,
    val: int = 800,
    size: int = 32,
    frames: int = 20,
    fps: int = 10,
    seed: int = 0,
    workers: int | None = None,
) -> DemoData:
    """Write the embedded data set into a new folder and say what is there; see `write_demo_data` for the arguments.

    Raises:
        UsageError: the folder holds something, or a number is out of range.
    """
    from diffmae_video.data.synthetic import CLASSES, write_demo_data

    with console.progress(train + val, "demo-data", "clips") as line:
        result = write_demo_data(
            directory,
            train=train,
            val=val,
            size=size,
            frames=frames,
            fps=fps,
            seed=seed,
            workers=workers,
            progress=line.update,
        )
    counts = ", ".join(f"{count} {split}" for split, count in result.counts.items())
    console.say(f"Wrote {counts} clips of {len(CLASSES)} classes to {directory} ({result.bytes / 1e6:.1f} MB).")
    return result


def demo(out: Path, *, recipe: str = "demo", seed: int | None = None, device: str = "auto") -> DemoResult:
    """Run the whole chain on the embedded data set and prove what it gives.

    Clips, shards, pre-training on all clips without labels, fine-tuning on few labels from that encoder and from
    scratch with the same budget, evaluation of both, inpainting beside two baselines. Stages that are done are not
    repeated; an interrupted training continues.

    Args:
        out: folder for everything.
        recipe: settings of all stages: `demo`, `smoke`, or a TOML file.
        seed: of the clips and of every stage; the recipe's by default.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UsageError: `out` holds something else, or a demo of another recipe or seed.
    """
    settings = load_settings(recipe, "pretrain")
    seed = settings.seed if seed is None else seed
    stages = _Stages(out, {"version": __version__, "recipe": recipe, "seed": seed})
    shared: dict[str, Any] = {"seed": seed, "device": device}
    with _workspace(out):
        stages.run("demo-data", lambda: _write_data(out / "kinetics-demo", recipe, seed))
        stages.run("shard", lambda: _shard(out / "kinetics-demo", out / "shards"))
        stages.run("pretrain", lambda: _pretrain(out, recipe, **shared))
        for name, init in _MODELS.items():
            start = "scratch" if init == "scratch" else str(out / init)
            stages.run(f"finetune {name}", lambda: _finetune(out, name, start, recipe, **shared))  # noqa: B023
        for name in _MODELS:
            stages.run(f"eval {name}", lambda: _evaluate(out, name, recipe, device))  # noqa: B023
        stages.run("inpainting", lambda: _inpainting(out, recipe, **shared))
        stages.run("render", lambda: _render(out, recipe, **shared))
    result = _conclude(out, stages)
    _write_report(result, stages, recipe, seed)
    _print(result, stages)
    return result


class _Stages:
    """What is done already, in `demo.json`: results of the stages, so that a second run continues."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.file = out / "demo.json"
        self.results: dict[str, dict[str, Any]] = {}
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; name a folder.")
        if self.file.exists():
            try:
                state = json.loads(self.file.read_text(encoding="utf-8"))
                before, self.results = dict(state["identity"]), dict(state["stages"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self.file} cannot be read ({error}); remove {out} or name another --out."
                ) from error
            for name, value in identity.items():
                if before.get(name) != value:
                    raise UsageError(
                        f"--out {out} holds a demo with {name} {before.get(name)}, not {value}; name another folder."
                    )
        elif out.is_dir() and any(out.iterdir()):
            raise UsageError(f"--out {out} already holds something else; name another folder or remove it.")
        out.mkdir(parents=True, exist_ok=True)
        self.identity = identity
        self._save()

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> None:
        """Run a stage unless it is on record; its plain facts and its seconds are kept."""
        if name in self.results:
            console.say(f"\n== {name}: done before")
            return
        console.say(f"\n== {name}")
        begun = time.monotonic()
        facts = stage()
        self.results[name] = facts | {"seconds": round(time.monotonic() - begun, 1)}
        self._save()

    def _save(self) -> None:
        write_atomic(self.file, json.dumps({"identity": self.identity, "stages": self.results}, indent=1))


@contextmanager
def _workspace(out: Path) -> Iterator[None]:
    """The stages record what they make in the demo's own folder, not in the one it was called from."""
    before = os.environ.get("DIFFMAE_WORKSPACE")
    os.environ["DIFFMAE_WORKSPACE"] = str(out.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["DIFFMAE_WORKSPACE"]
        else:
            os.environ["DIFFMAE_WORKSPACE"] = before


def _write_data(folder: Path, recipe: str, seed: int) -> dict[str, Any]:
    if folder.exists():  # the folder appears whole, so a run that stopped right after it has nothing left to do
        return {"counts": {split: len(list((folder / split).iterdir())) for split in ("train", "val")}}
    model = load_settings(recipe, "pretrain").model
    clips = {"train": 48, "val": 16} if recipe == "smoke" else {"train": 4000, "val": 400}
    result = demo_data(folder, **clips, size=model.size[0], frames=model.frames + 4, seed=seed)
    return {"counts": result.counts}


def _shard(source: Path, shards: Path) -> dict[str, Any]:
    from diffmae_video.data.transcode import TranscodeOptions
    from diffmae_video.pipelines.shard import ShardJob, shard

    # The clips are small and made to decode fast: their bytes are kept.
    result = shard(ShardJob(source, shards, dataset="demo", options=TranscodeOptions(copy=True)))
    return {"found": result.found, "written": result.written, "bytes": result.bytes}


def _pretrain(out: Path, recipe: str, seed: int, device: str) -> dict[str, Any]:
    from diffmae_video.pipelines.pretrain import pretrain

    job = Job(recipe=recipe, seed=seed, data=str(out / "shards"), out=out / "pretrain", device=device)
    result = pretrain(job)
    return {"step": result.step, "loss": result.metrics.get("loss")}


def _finetune(out: Path, name: str, init: str, recipe: str, seed: int, device: str) -> dict[str, Any]:
    from diffmae_video.pipelines.finetune import finetune

    folder = out / f"finetune-{name}"
    job = Job(recipe=recipe, seed=seed, data=str(out / "shards"), out=folder, device=device)
    result = finetune(job, "demo", init=init)
    assert result is not None  # only a dry run has none
    return {"step": result.step}


def _evaluate(out: Path, name: str, recipe: str, device: str) -> dict[str, Any]:
    from diffmae_video.pipelines.evaluate import evaluate, print_evaluation

    folder = out / f"eval-{name}"
    if folder.exists() and (folder / "eval.json").exists():
        shutil.rmtree(folder)  # finished, but its result was not put on record: seconds to do again
    source = str(out / f"finetune-{name}")
    result = evaluate(Job(checkpoint=source, data=str(out / "shards"), device=device, out=folder), "demo")
    assert result is not None
    print_evaluation(result)
    interval = next(reversed(result.scores.values())).top1_interval
    bounds = [interval.low, interval.high] if interval else None
    return {"top1": result.top1, "interval": bounds, "clips": result.used}


def _inpainting(out: Path, recipe: str, seed: int, device: str) -> dict[str, Any]:
    from diffmae_video.pipelines.evaluate_inpainting import evaluate_inpainting

    settings = load_settings(recipe, "render")
    clips = 2 if recipe == "smoke" else 64
    folder = out / "eval-inpaint"
    if folder.exists():
        shutil.rmtree(folder)  # of a run that was stopped: seconds to do again
    result = evaluate_inpainting(
        checkpoint=out / "pretrain",
        data=str(out / "shards"),
        masks=[f"{settings.mask.kind}:{settings.mask.ratio}"],
        overrides=[
            f"evaluate.clips={clips}",
            "evaluate.samples=1",
            *(f"render.{name}={getattr(settings.render, name)}" for name in ("sampler", "steps", "eta")),
        ],
        out=folder,
        seed=seed,
        device=device,
        deep=False,
    )
    assert result is not None
    psnr = {
        mask: {name: figures["psnr_masked"] for name, figures in row.items()} for mask, row in result.scores.items()
    }
    return {"psnr": psnr, "clips": clips}


def _render(out: Path, recipe: str, seed: int, device: str) -> dict[str, Any]:
    from diffmae_video.pipelines.render_inpaint import render_inpaint

    clips = sorted((out / "kinetics-demo" / "val").glob("*.mp4"))[: 1 if recipe == "smoke" else 3]
    folders = []
    for number, clip in enumerate(clips, 1):
        folder = out / f"inpaint-{number}"
        if folder.exists():
            shutil.rmtree(folder)  # of a run that was stopped: seconds to do again
        result = render_inpaint(clip, checkpoint=out / "pretrain", recipe=recipe, out=folder, seed=seed, device=device)
        assert result is not None
        folders.append({"folder": folder.name, "clip": clip.name, "psnr_masked": result.psnr_masked})
    return {"renders": folders}


def _conclude(out: Path, stages: _Stages) -> DemoResult:
    import resource
    import sys

    results = stages.results
    unit = 1 if sys.platform == "darwin" else 1024
    render = out / results["render"]["renders"][0]["folder"]
    files = {
        "report": out / "report.html",
        "sheet": render / "sheet.png",
        "comparison": render / "comparison.mp4",
        "inpainted": render / "inpainted.mp4",
    }
    return DemoResult(
        out,
        {name: results[f"eval {name}"]["top1"] for name in _MODELS},
        1 / 8,
        results["inpainting"]["psnr"],
        {name: facts["seconds"] for name, facts in results.items()},
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        files,
    )


def _rows(result: DemoResult, stages: _Stages) -> list[list[str]]:
    """One table for everything that is proved: what, figure, beside what."""

    def percent(name: str) -> str:
        interval = stages.results[f"eval {name}"]["interval"]
        bounds = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
        return f"{100 * result.top1[name]:.1f} %{bounds}"

    rows = [
        ["top-1 on motions", "DiffMAE pre-training, then few labels", percent("pretrained")],
        ["top-1 on motions", "from scratch, same labels and steps", percent("scratch")],
        ["top-1 on motions", "chance", f"{100 * result.chance:.1f} %"],
    ]
    for mask, row in result.psnr.items():
        rows += [[f"PSNR of hidden pixels, {mask}", name, f"{value:.2f} dB"] for name, value in row.items()]
    return rows


def _summary(result: DemoResult) -> str:
    from diffmae_video.evaluation.inpainting import BASELINES
    from diffmae_video.pipelines.evaluate_inpainting import SAMPLE

    gain = 100 * (result.top1["pretrained"] - result.top1["scratch"])
    above = 100 * (result.top1["pretrained"] - result.chance)
    worst = min(row[SAMPLE] - max(row[name] for name in BASELINES) for row in result.psnr.values())
    return (
        f"Fine-tuned top-1 is {above:+.1f} points from chance and {gain:+.1f} points from training from scratch; "
        f"sampled inpainting is {worst:+.2f} dB from the best baseline."
    )


def _print(result: DemoResult, stages: _Stages) -> None:
    console.say("")
    console.table("What the demo shows", ["figure", "of", "value (95% interval)"], _rows(result, stages))
    console.say(_summary(result))
    total = console.format_seconds(sum(result.seconds.values()))
    console.say(f"All stages took {total}; peak memory of the main process {result.peak_memory / 2**30:.2f} GiB.")
    console.say("Look at:")
    for path in result.files.values():
        console.say(f"  {path}")


def _write_report(result: DemoResult, stages: _Stages, recipe: str, seed: int) -> None:
    from diffmae_video.config import settings_toml
    from diffmae_video.data.synthetic import CLASSES
    from diffmae_video.rendering.report import Report
    from diffmae_video.training.logging import read_metrics

    out, results = result.directory, stages.results
    counts = results["demo-data"]["counts"]
    tuning = load_settings(recipe, "finetune")
    labels = round(counts["train"] * tuning.data.label_fraction)
    report = Report("diffmae demo")
    report.text(
        f"{_summary(result)}\n\n"
        f"One DiffMAE was pre-trained on {counts['train']} clips without labels. A classifier of {len(CLASSES)} "
        f"motions was then fine-tuned on about {labels} labels ({tuning.data.label_fraction:.0%}), from that "
        f"encoder and from scratch, {tuning.train.steps} steps of {tuning.train.batch_size} clips each. "
        f"Both were tested on {results['eval pretrained']['clips']} other clips. No single frame tells the motion."
    )
    if recipe == "smoke":
        report.text("**This is the smoke recipe**: it proves that the chain runs; the figures mean nothing.")
    note = (
        f"PSNR: over all hidden pixels of {results['inpainting']['clips']} validation clips. One step "
        "gives a mean of the possible answers, which PSNR favours; sampling gives one of them."
    )
    report.table("What the demo shows", ["figure", "of", "value (95% interval)"], _rows(result, stages), note)
    for number, part in enumerate(results["render"]["renders"], 1):
        folder = out / part["folder"]
        label = f"Inpainting {number}: {part['clip']}, {part['psnr_masked']:.1f} dB"
        report.image(label, folder / "sheet.png")
        report.video(f"Inpainting {number}: source, masked, result", folder / "comparison.mp4")
    curves = {name: _curve(read_metrics(out / name / "metrics.jsonl"), "loss") for name in ("pretrain",)}
    report.curves("Pre-training loss", curves, log_y=True, y_label="squared error of masked patches")
    for title, column in (("Fine-tuning loss", "loss"), ("Fine-tuning accuracy on its batches", "train_top1")):
        both = {name: _curve(read_metrics(out / f"finetune-{name}" / "metrics.jsonl"), column) for name in _MODELS}
        report.curves(title, both)
    report.table("Time", ["stage", "seconds"], [[name, float(value)] for name, value in result.seconds.items()])
    for stage in ("pretrain", "finetune", "evaluate", "render"):
        report.settings(settings_toml(load_settings(recipe, stage)), f"Settings of {stage}")
    report.text(f"Seed {seed}, diffmae-video {__version__}, recipe `{recipe}`.")
    report.write(result.files["report"])


def _curve(lines: list[dict[str, Any]], column: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[column]) for line in lines if isinstance(line.get(column), int | float)]
    return [step for step, _ in points], [value for _, value in points]

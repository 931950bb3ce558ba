"""`diffmae demo-data` and `diffmae demo`: the embedded data set, and the whole chain on it with a proof at the end."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffmae_video._version import __version__
from diffmae_video.config import load_settings
from diffmae_video.data.decode import VideoReader
from diffmae_video.data.synthetic import CLASSES, DemoData, encode_mp4, removal_clip, write_demo_data
from diffmae_video.data.transcode import TranscodeOptions
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.image_metrics import Closeness
from diffmae_video.evaluation.inpainting import telea
from diffmae_video.files import write_atomic
from diffmae_video.mask_text import MaskRequest
from diffmae_video.pipelines import console
from diffmae_video.pipelines.demo_report import DemoResult, Results, demo_rows, demo_summary, write_demo_report
from diffmae_video.pipelines.evaluate import evaluate, print_evaluation
from diffmae_video.pipelines.evaluate_inpainting import evaluate_inpainting
from diffmae_video.pipelines.finetune import finetune
from diffmae_video.pipelines.job import Job
from diffmae_video.pipelines.pretrain import pretrain
from diffmae_video.pipelines.render_inpaint import render
from diffmae_video.pipelines.shard import ShardJob, shard
from diffmae_video.training.hardware import peak_resident

_MODELS = {"pretrained": "pretrain", "scratch": "scratch"}  # fine-tuned model -> where its weights start


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
    scratch with the same budget, evaluation of both, inpainting beside two baselines, and a ball that is removed from a
    clip. Stages that are done are not
    repeated; an interrupted training continues.

    Args:
        out: folder for everything.
        recipe: settings of all stages: `demo`, `smoke`, or a TOML file.
        seed: of the clips and of every stage; the recipe's by default.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UsageError: `out` holds something else, or a demo of another recipe or seed.
    """
    seed = load_settings(recipe, "pretrain").seed if seed is None else seed
    job = Job(recipe=recipe, seed=seed, device=device, out=out)
    with _workspace(out):
        results = _run_stages(job, {"version": __version__, "recipe": recipe, "seed": seed})
    result = _conclude(out, results)
    write_demo_report(result, results, job)
    _print(result, results)
    return result


def _run_stages(job: Job, identity: dict[str, Any]) -> Results:
    """Run what is not on record in `demo.json`. A stage that was interrupted continues through its own run folder."""
    file = _path(job, "demo.json")
    results = _results_on_record(file, identity)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "demo-data": lambda: _write_data(job),
        "shard": lambda: _shard(_path(job, "kinetics-demo"), _path(job, "shards")),
        "pretrain": lambda: _pretrain(job),
        **{f"finetune {name}": partial(_finetune, job, name) for name in _MODELS},
        **{f"eval {name}": partial(_evaluate, job, name) for name in _MODELS},
        "inpainting": lambda: _inpainting(job),
        "render": lambda: _render(job),
        "removal": lambda: _removal(job),
    }
    for name, stage in stages.items():
        if name in results:
            console.say(f"\n== {name}: done before")
            continue
        console.say(f"\n== {name}")
        begun = time.monotonic()
        results[name] = stage() | {"seconds": round(time.monotonic() - begun, 1)}
        write_atomic(file, json.dumps({"identity": identity, "stages": results}, indent=1))
    return results


def _results_on_record(file: Path, identity: dict[str, Any]) -> Results:
    """Results of the stages by name; an empty record is made in a new folder."""
    out = file.parent
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder.")
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(f"--out {out} already holds something else; name another folder or remove it.")
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"identity": identity, "stages": {}}, indent=1))
        return {}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        before, results = dict(state["identity"]), dict(state["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); remove {out} or name another --out.") from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise UsageError(
                f"--out {out} holds a demo with {name} {before.get(name)}, not {value}; name another folder."
            )
    return results


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


def _folder(job: Job, name: str, **changes: Any) -> Job:
    """The job of one stage: it writes into a folder of the demo's."""
    return job.with_(out=_path(job, name), **changes)


def _path(job: Job, name: str) -> Path:
    assert job.out is not None
    return job.out / name


def _write_data(job: Job) -> dict[str, Any]:
    folder = _path(job, "kinetics-demo")
    if folder.exists():  # the folder appears whole, so a run that stopped right after it has nothing left to do
        return {"counts": {split: len(list((folder / split).iterdir())) for split in ("train", "val")}}
    model = load_settings(job.recipe, "pretrain").model
    clips = {"train": 48, "val": 16} if job.recipe == "smoke" else {"train": 4000, "val": 400}
    result = demo_data(folder, **clips, size=model.size[0], frames=model.frames + 4, seed=job.seed or 0)
    return {"counts": result.counts}


def _shard(source: Path, shards: Path) -> dict[str, Any]:

    # The clips are small and made to decode fast: their bytes are kept.
    result = shard(ShardJob(source, shards, dataset="demo", options=TranscodeOptions(copy=True)))
    return {"found": result.found, "written": result.written, "bytes": result.bytes}


def _pretrain(job: Job) -> dict[str, Any]:

    result = pretrain(_folder(job, "pretrain", data=_path(job, "shards")))
    return {"step": result.step, "loss": result.metrics.get("loss")}


def _finetune(job: Job, name: str) -> dict[str, Any]:

    init = "scratch" if _MODELS[name] == "scratch" else str(_path(job, _MODELS[name]))
    result = finetune(_folder(job, f"finetune-{name}", data=_path(job, "shards")), "demo", init=init)
    assert result is not None  # only a dry run has none
    return {"step": result.step}


def _evaluate(job: Job, name: str) -> dict[str, Any]:

    file = _path(job, f"eval-{name}") / "eval.json"
    if not file.exists():
        asked = Job(checkpoint=str(_path(job, f"finetune-{name}")), data=str(_path(job, "shards")), device=job.device)
        result = evaluate(asked.with_(out=file.parent), "demo")
        assert result is not None
        print_evaluation(result)
    report = json.loads(file.read_text(encoding="utf-8"))
    last = list(report["views"].values())[-1]
    return {"top1": report["top1"], "interval": last["top1_interval"], "clips": report["videos"]["used"]}


def _inpainting(job: Job) -> dict[str, Any]:

    settings = load_settings(job.recipe, "render")
    clips = 2 if job.recipe == "smoke" else 64
    overrides = [f"evaluate.clips={clips}", "evaluate.samples=1"]
    overrides += [f"render.{name}={getattr(settings.render, name)}" for name in ("sampler", "steps", "eta")]
    asked = _folder(job, "eval-inpaint", checkpoint=str(_path(job, "pretrain")), data=str(_path(job, "shards")))
    mask = f"{settings.mask.kind}:{settings.mask.ratio}"
    result = evaluate_inpainting(asked.with_(overrides=tuple(overrides)), masks=[mask], deep=False)
    assert result is not None
    psnr = {
        mask: {name: figures["psnr_masked"] for name, figures in row.items()} for mask, row in result.scores.items()
    }
    return {"psnr": psnr, "clips": clips}


def _render(job: Job) -> dict[str, Any]:

    clips = sorted((_path(job, "kinetics-demo") / "val").glob("*.mp4"))[: 1 if job.recipe == "smoke" else 3]
    folders = []
    for number, clip in enumerate(clips, 1):
        result = render(_folder(job, f"inpaint-{number}", checkpoint=str(_path(job, "pretrain"))), clip)
        assert result is not None
        folders.append({"folder": f"inpaint-{number}", "clip": clip.name, "psnr_masked": result.psnr_masked})
    return {"renders": folders}


def _removal(job: Job) -> dict[str, Any]:
    """Remove a ball from a clip, of which is known what is behind it."""
    folder, frames = _path(job, "ball"), 12 if job.recipe == "smoke" else 40
    clip = removal_clip(seed=job.seed or 0, frames=frames)
    folder.mkdir(exist_ok=True)
    mask = io.BytesIO()
    np.save(mask, clip.hidden)
    write_atomic(folder / "mask.npy", mask.getvalue())
    write_atomic(folder / "clip.mp4", encode_mp4(clip.rgb, 20))
    asked = _folder(job, "removal", checkpoint=str(_path(job, "pretrain")))
    result = render(asked, folder / "clip.mp4", MaskRequest((str(folder / "mask.npy"),)))
    assert result is not None
    psnr = {}
    with VideoReader(folder / "clip.mp4") as given, VideoReader(Path(result.video)) as made:
        source, removed = (np.stack([rgb for rgb, _ in reader]) for reader in (given, made))
    for name, pictures in (("removal", removed), ("OpenCV Telea", telea(source, clip.hidden))):
        closeness = Closeness()
        for truth, picture, hidden in zip(clip.truth, pictures, clip.hidden, strict=True):
            closeness.add(truth, picture, hidden)
        psnr[name] = closeness.figures()["psnr_masked"]
    return {"folder": "removal", "psnr": psnr, "from_other_frames": result.propagated_share}


def _conclude(out: Path, results: Results) -> DemoResult:
    render = out / results["render"]["renders"][0]["folder"]
    files = {
        "report": out / "report.html",
        "sheet": render / "sheet.png",
        "comparison": render / "comparison.mp4",
        "inpainted": render / "inpainted.mp4",
        "removal": out / results["removal"]["folder"] / "comparison.mp4",
    }
    return DemoResult(
        out,
        {name: results[f"eval {name}"]["top1"] for name in _MODELS},
        1 / 8,
        results["inpainting"]["psnr"],
        {name: facts["seconds"] for name, facts in results.items()},
        round(peak_resident() * 2**30),
        files,
    )


def _print(result: DemoResult, results: Results) -> None:
    console.say("")
    console.table("What the demo shows", ["figure", "of", "value (95% interval)"], demo_rows(result, results))
    console.say(demo_summary(result))
    total = console.format_seconds(sum(result.seconds.values()))
    console.say(f"All stages took {total}; peak memory of the main process {result.peak_memory / 2**30:.2f} GiB.")
    console.say("Look at:")
    for path in result.files.values():
        console.say(f"  {path}")

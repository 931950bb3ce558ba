"""Commands around recognition: finetune, eval, features, predict, compare, loss-sweep."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffmae_video.cli.options import OutOption, SeedOption, job_of, shares

TaskOption = Annotated[
    str,
    typer.Option("--task", metavar="NAME", help="k400, ssv2, ucf101, hmdb51, imagenet, or your own."),
]
ViewsOption = Annotated[
    str | None,
    typer.Option("--views", metavar="KxS[,...]", help="Clips x crops, e.g. 7x3; the task's by default."),
]


class ProbeProtocol(str, Enum):
    """How much is trained."""

    finetune = "finetune"
    linear = "linear"
    attentive = "attentive"
    knn = "knn"


class TestProtocol(str, Enum):
    """What classifies."""

    head = "head"
    denoise = "denoise"


@shares("data", "recipe", "overrides", "out", "seed", "device", "nproc", "resume", "dry_run", "device_memory")
def finetune(
    task: TaskOption,
    init: Annotated[
        str,
        typer.Option(
            "--init",
            metavar="auto|scratch|PATH|HUB NAME",
            help="Weights to start from, also hf:user/model or timm:NAME; auto takes the newest pre-training.",
        ),
    ] = "auto",
    protocol: Annotated[
        ProbeProtocol | None,
        typer.Option("--protocol", help="Train everything, or probe frozen features."),
    ] = None,
    **options: Any,
) -> None:
    """Train a classifier on a pre-trained encoder, or probe it.

    Example: diffmae finetune --task k400
    """
    from diffmae_video.pipelines import finetune as stage

    stage.finetune(job_of(options), task, init, protocol.value if protocol else None)


@shares("checkpoint", "data", "overrides", "out", "seed", "device", "nproc", "resume:again", "dry_run")
def evaluate(
    task: TaskOption,
    views: ViewsOption = None,
    masks: Annotated[
        str | None,
        typer.Option("--masks", help="For inpaint: random:0.75,center,tube:0.9,frames,future."),
    ] = None,
    protocol: Annotated[
        TestProtocol | None,
        typer.Option(
            "--protocol",
            help="Classify by the trained head (the default), or by the label under which a pre-training with "
            "model.labels denoises best.",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Test on a task: multi-view classification, `--task inpaint`, or `--task propagate` (objects followed, DAVIS).

    Example: diffmae eval --task k400 --views 1x1,7x3
    """
    from diffmae_video.pipelines import evaluate as stage

    chosen = None if protocol is None else protocol.value
    stage.evaluate_task(job_of(options), task, views=views, masks=masks, protocol=chosen)


@shares("checkpoint", "data", "overrides", "out:cache", "device", "nproc", "dry_run")
def features(
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="Split to read; may be repeated; all by default."),
    ] = None,
    views: Annotated[str, typer.Option("--views", metavar="KxS", help="Views averaged for each video.")] = "1x1",
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Keep all tokens (half precision), not their mean."),
    ] = False,
    **options: Any,
) -> None:
    """Write the encoder's features of a data set: safetensors with a parquet table of keys and labels.

    Example: diffmae features --split val --out features/
    """
    from diffmae_video.pipelines.features import extract_features

    extract_features(job_of(options), split or [], views, tokens)


@shares("checkpoint", "overrides", "device")
def predict(
    clips: Annotated[list[Path], typer.Argument(metavar="CLIP...", help="Videos or images.")],
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Take the newest classifier of this task."),
    ] = None,
    views: Annotated[
        str, typer.Option("--views", metavar="KxS", help="Clips x crops whose probabilities are averaged, e.g. 5x3.")
    ] = "1x1",
    top: Annotated[int, typer.Option("--top", min=1, help="Classes shown for each clip.")] = 5,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
    **options: Any,
) -> None:
    """Classify loose files with a fine-tuned model.

    Example: diffmae predict holiday.mp4 --task k400
    """
    from diffmae_video.pipelines import predict as stage

    found = stage.predict(job_of(options), clips, task, views, top, quiet=json_lines)
    if not stage.print_predictions(found, json_lines=json_lines):
        raise typer.Exit(3)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of an evaluation.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.")],
    views: Annotated[
        str | None,
        typer.Option("--views", metavar="KxS", help="Protocol; the last of each by default."),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Compare the videos both have.")] = False,
    out: OutOption = None,
    seed: SeedOption = None,
) -> None:
    """Test whether two evaluations of the same videos differ: paired bootstrap, McNemar, classes.

    Example: diffmae compare runs/eval-001 runs/eval-002
    """
    from diffmae_video.pipelines.compare import compare_evaluations as run
    from diffmae_video.pipelines.compare import print_comparison

    result = run(a, b, views=views, common=common, out=out, seed=seed or 0)
    print_comparison(result, str(a), str(b))


@shares("data", "overrides", "out", "seed", "device", "dry_run")
def loss_sweep(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Pre-training run; the workspace's newest by default.")
    ] = None,
    clips: Annotated[int, typer.Option("--clips", min=1, help="Clips of the split.")] = 64,
    steps: Annotated[
        int,
        typer.Option("--steps", min=2, help="Timesteps, dense where signal turns to noise."),
    ] = 11,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", min=0.01, max=0.99, help="Mask ratio; may be repeated."),
    ] = None,
    **options: Any,
) -> None:
    """Measure the denoising error by timestep and mask ratio: does pre-training work?

    Example: diffmae loss-sweep runs/pretrain-001
    """
    from diffmae_video.pipelines import loss_sweep as stage

    stage.loss_sweep(job_of(options), run, clips, steps, ratio or [])


COMMANDS = {
    "finetune": finetune,
    "eval": evaluate,
    "features": features,
    "predict": predict,
    "compare": compare,
    "loss-sweep": loss_sweep,
}

"""`diffmae finetune --task NAME`: a classifier on a pre-trained encoder, by the training loop of pre-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmae_video.config import Settings
from diffmae_video.errors import UsageError
from diffmae_video.pipelines import console
from diffmae_video.pipelines.classifiers import Loaded
from diffmae_video.pipelines.finetune_plan import FinetunePlan, describe_plan, plan_finetune, predict_plan
from diffmae_video.pipelines.probe import probe
from diffmae_video.pipelines.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffmae_video.data.stream import ClipStream
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.training.distributed import Distributed


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuning run."""

    directory: Path
    task: str
    init: str  # `scratch`, or where the weights came from
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


def finetune(
    task: str,
    *,
    init: str = "auto",
    protocol: str | None = None,
    data: str | Path | None = None,
    recipe: str = "auto",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str = "auto",
    out: Path | None = None,
    resume: str = "auto",
    nproc: int = 1,
    dry_run: bool = False,
) -> FinetuneResult | None:
    """Train a classifier on the training split of a task, or probe a frozen encoder.

    Args:
        task: data set name, as its shards say.
        init: `auto` (the workspace's newest pre-training), `scratch`, or a run, export or import of `diffmae import`.
        protocol: `finetune`, `linear`, `attentive` or `knn`; the recipe's by default.
        data: shards; the workspace's newest of the task by default.
        recipe: settings to start from; `auto` takes the peers' for this task and model size on a GPU, else those of
            the pre-training run, else what fits the device.
        out: run folder; an unfinished run of the same settings in it is continued.
        resume: `auto`, `never` or a checkpoint.
        nproc: processes on this machine.
        dry_run: print the plan with FLOPs, memory and hours, and make nothing; returns None.

    Raises:
        UsageError, DataError: see the messages.
    """
    plan = plan_finetune(task, init, protocol, data, recipe, overrides, seed, device)
    describe_plan(plan, device)
    if dry_run:
        predict_plan(plan, device, nproc)
        return None
    arguments = {"plan": plan, "device": device, "out": out, "resume": resume}
    if nproc > 1:
        from diffmae_video.training.distributed import launch

        result = launch(_run, nproc, **arguments)
    else:
        result = _run(**arguments)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    console.say(f"Done: {result.directory} ({shown}).")
    return result


def build_classifier(
    source: str | None, settings: Settings, classes: list[str]
) -> tuple[Classifier, dict[str, Any], str | None]:
    """The classifier before its first step.

    The head of a classifier is kept where it was trained on the same classes, or has no names and their number (an
    import); otherwise a new one is drawn by the seed.

    Returns:
        The model, model.json's info of where it came from, and a line to say about the head (None from scratch).
    """
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.encoder import Encoder
    from diffmae_video.models.weights import load_model

    tuning = settings.finetune
    options: dict[str, Any] = {
        "pool": tuning.pool,
        "dropout": tuning.dropout,
        "drop_path": tuning.drop_path,
        "head_init": tuning.head_init,
        "seed": settings.seed,
    }
    if source is None:
        return Classifier(Encoder(settings.model, settings.seed), len(classes), **options), {}, None
    model = load_model(source)
    built = Classifier(model.encoder, len(classes), **options)
    line = f"Head: new, for {len(classes)} classes."
    if isinstance(model, Classifier) and model.pool == tuning.pool and model.num_classes == len(classes):
        names = model.info.get("classes")
        if not names or list(names) == classes:
            built.head.load_state_dict(model.head.state_dict())
            if built.attention is not None:
                built.attention.load_state_dict(model.attention.state_dict())
            line = "Head: kept from the checkpoint, which has the same classes."
            if not names:
                line = f"Head: kept from the checkpoint, which has {len(classes)} classes without names."
    return built, dict(model.info), line


def _run(plan: FinetunePlan, device: str, out: Path | None, resume: str) -> FinetuneResult:
    """The part of one process."""
    from diffmae_video.training.distributed import start

    with start(device) as processes:
        settings, manifest = plan.settings, plan.manifest
        workspace = Workspace.here()
        info = {
            "task": plan.task,
            "dataset": manifest.dataset,
            "classes": manifest.classes,
            "recipe": plan.recipe,
            "init": plan.source or "scratch",
            "protocol": settings.finetune.protocol,
            "frames": 1 if manifest.kind == "image" else settings.model.frames,
            "size": list(settings.model.size),
            "stride": settings.data.stride,
        }
        if settings.finetune.protocol != "finetune":
            folder = workspace.new_run_directory("finetune", out) if processes.main else None
            directory = Path(processes.broadcast(str(folder)))
            loaded = _frozen(plan, processes.device)
            metrics = probe(processes, loaded, manifest, directory, info)
            step = 0
        else:
            directory, step, metrics = _train(plan, processes, out, resume, info)
        if processes.main and (settings.finetune.protocol != "knn"):
            workspace.record("finetune", directory, task=plan.task, dataset=manifest.dataset, init=info["init"])
        return FinetuneResult(directory, plan.task, info["init"], step, metrics)


def _train(
    plan: FinetunePlan, processes: Distributed, out: Path | None, resume: str, info: dict[str, Any]
) -> tuple[Path, int, dict[str, float]]:
    """Fine-tune through the training loop: (directory, step, metrics)."""
    from diffmae_video.data.stream import build_stream
    from diffmae_video.evaluation.finetuning import FinetuneTask
    from diffmae_video.models.patches import normalize_pixels
    from diffmae_video.pipelines.run_report import write_run_report
    from diffmae_video.training.loop import micro_batch_size, train

    settings, manifest = plan.settings, plan.manifest
    micro = micro_batch_size(settings.train, processes.world)
    model, before, line = build_classifier(plan.source, settings, manifest.classes)
    if line:
        console.say(line)
    if settings.train.grad_checkpointing:
        model.set_grad_checkpointing()
    if settings.finetune.freeze > model.encoder.depth:
        raise UsageError(
            f"finetune.freeze = {settings.finetune.freeze}: the encoder has {model.encoder.depth} blocks; lower it."
        )

    def normalize(clips: Tensor) -> Tensor:
        return normalize_pixels(clips, settings.model.pixel_norm)

    def validate(network: nn.Module, step: int) -> dict[str, float]:
        return quick_accuracy(network, settings, processes, normalize, micro)

    def streams(rank: int, world: int) -> ClipStream:
        return build_stream(
            settings, split=settings.data.split, batch_size=micro, training=True, rank=rank, world=world
        )

    task = FinetuneTask(
        model,
        settings.finetune,
        classes=len(manifest.classes),
        normalize=normalize,
        describe={**{key: value for key, value in before.items() if key == "source"}, **info},
        evaluate=validate,
        seed=settings.seed,
    )
    identity = f"{manifest.hash} from {_digest(plan.source)}"
    directory = processes.broadcast(str(_directory(settings, identity, out, resume)) if processes.main else None)
    result = train(
        task,
        settings,
        streams,
        Path(directory),
        kind="finetune",
        data_hash=identity,
        resume=resume,
        distributed=processes,
        progress=console.progress,
        report=write_run_report,
        say=console.say,
    )
    kept = ("loss", "train_top1", "val_loss", "val_top1", "val_top5")
    return result.directory, result.step, {key: result.metrics[key] for key in kept if key in result.metrics}


def _directory(settings: Settings, identity: str, out: Path | None, resume: str) -> Path:
    """`--out`, or the newest unfinished run of the same settings, or a new folder."""
    from diffmae_video.training import run

    if out is not None:
        return out
    workspace = Workspace.here()
    wanted = run.run_identity(settings, "finetune", identity)
    if resume == "auto":
        for folder in sorted((workspace.folder / "runs").glob("finetune-*"), reverse=True):
            status = run.read_status(folder)
            if (
                status
                and status.get("status") != "finished"
                and not run.identity_difference(status.get("identity", {}), wanted)
            ):
                return folder
    return workspace.new_run_directory("finetune")


def quick_accuracy(
    model: nn.Module, settings: Settings, processes: Distributed, normalize: Callable[[Tensor], Tensor], batch: int
) -> dict[str, float]:
    """Loss, top-1 and top-5 on the evaluation split, one centre view a video. A collective."""
    import torch
    import torch.nn.functional as F

    from diffmae_video.data.stream import build_stream
    from diffmae_video.evaluation.metrics import top_k_hits

    sums = torch.zeros(4, dtype=torch.float64)  # videos, loss, top-1, top-5
    stream = build_stream(
        settings,
        split=settings.data.eval_split,
        batch_size=batch,
        training=False,
        rank=processes.rank,
        world=processes.world,
    )
    with stream, torch.inference_mode():
        for part in stream:
            known = part.labels >= 0
            if not known.any():
                continue
            labels = part.labels[known]
            logits = model(normalize(part.clips[known].to(processes.device))).float().cpu()  # (B, K)
            hits = [top_k_hits(logits, labels, k).sum() for k in (1, 5)]
            sums += torch.tensor([len(labels), F.cross_entropy(logits, labels, reduction="sum"), *hits])
    videos, loss, top1, top5 = processes.sum(sums).tolist()
    return {"val_loss": loss / videos, "val_top1": top1 / videos, "val_top5": top5 / videos} if videos else {}


def _digest(source: str | None) -> str:
    from diffmae_video.models.weights import saved_sha256

    return "scratch" if source is None else saved_sha256(source)


def _frozen(plan: FinetunePlan, device: torch.device) -> Loaded:
    """The model a probe looks at."""
    from diffmae_video.models.classifier import Classifier
    from diffmae_video.models.encoder import Encoder
    from diffmae_video.models.weights import load_model

    settings, digest = plan.settings, _digest(plan.source)
    if plan.source is None:
        model: nn.Module = Classifier(Encoder(settings.model, settings.seed), 0)
        digest = f"scratch {settings.seed} {settings.model}"
    else:
        model = load_model(plan.source)
    return Loaded(model.to(device).eval().requires_grad_(False), settings, dict(model.info), digest, device)

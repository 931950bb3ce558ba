"""Fine-tuning as a task for the training loop: soft targets, mixed clips, frozen layers, quick validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffmae_video.compat  # noqa: F401

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from diffmae_video.config import FinetuneSettings, Settings
from diffmae_video.data.stream import build_stream
from diffmae_video.data.transforms import MixVideo
from diffmae_video.errors import UsageError
from diffmae_video.evaluation.metrics import top_k_hits
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.patches import normalize_pixels
from diffmae_video.models.weights import load_model
from diffmae_video.registry import tasks
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.streams import open_stream
from diffmae_video.training.task import LossOutput, TaskSetup, micro_batch_size


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (B,) of logits (B, K) against target distributions (B, K), in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def freeze_first(model: Any, blocks: int) -> int:
    """Freeze the embedding and the first blocks of a classifier's encoder; returns the parameters frozen.

    Layers are told apart by timm's `group_matcher`: layer 0 is the embedding, layer i + 1 is block i.

    Raises:
        ValueError: more blocks than the encoder has.
    """
    layers: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    depth = len(model.encoder.blocks)
    if blocks > depth:
        raise ValueError(f"finetune.freeze = {blocks}, but the encoder has {depth} blocks")
    frozen = 0
    for name, parameter in model.named_parameters():
        if blocks and layers[name] <= blocks:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


@tasks.register("finetune")
class FinetuneTask:
    """Classification on top of the encoder, for `training.loop.train`.

    Args:
        model: a Classifier; `model(clips float (B, C, T, H, W)) -> logits (B, K)`.
        settings: smoothing, mixup, cutmix, freeze.
        normalize: uint8 (B, T, C, H, W) -> float (B, C, T, H, W).
        describe: what model.json says about the run (classes, data set, recipe).
        evaluate: `(model, step) -> metrics`, the quick validation.
        streams: (rank, world) -> the training stream.
        seed: mixed into the draws of each batch.
    """

    monitor = ("val_top1", "max")  # which checkpoint counts as the best

    def __init__(
        self,
        model: nn.Module,
        settings: FinetuneSettings,
        *,
        classes: int,
        normalize: Callable[[Tensor], Tensor],
        describe: dict[str, Any],
        evaluate: Callable[[nn.Module, int], dict[str, float]],
        streams: Callable[[int, int], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.streams = model, streams
        self.normalize, self.evaluate, self.seed = normalize, evaluate, seed
        self._describe = describe
        self._mix = MixVideo(classes, settings.mixup, settings.cutmix, settings.smoothing)
        freeze_first(model, settings.freeze)

    @classmethod
    def build(cls, setup: TaskSetup) -> FinetuneTask:
        """A classifier on the encoder of `setup.init`, for the classes of the data.

        Raises:
            UsageError: more frozen blocks than the encoder has.
        """
        settings, processes = setup.settings, setup.processes
        micro = micro_batch_size(settings.train, processes.world)
        model, before, line = build_classifier(setup.init, settings, setup.classes)
        if line:
            setup.say(line)
        if settings.finetune.freeze > model.encoder.depth:
            raise UsageError(
                f"finetune.freeze = {settings.finetune.freeze}: the encoder has {model.encoder.depth} blocks; lower it."
            )

        def normalize(clips: Tensor) -> Tensor:
            return normalize_pixels(clips, settings.model.pixel_norm)

        return cls(
            model,
            settings.finetune,
            classes=len(setup.classes),
            normalize=normalize,
            describe={**{key: value for key, value in before.items() if key == "source"}, **setup.facts},
            evaluate=lambda network, step: quick_accuracy(network, settings, processes, normalize, min(micro, 32)),
            streams=lambda rank, world: open_stream(settings, rank, world),
            seed=settings.seed,
        )

    def open_stream(self, rank: int, world: int) -> Any:
        """Training batches of the task's shards."""
        assert self.streams is not None
        return self.streams(rank, world)

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> LossOutput:
        """Soft cross entropy; top-1 is counted against each clip's own label, mixed or not.

        Clips are mixed with others of the whole batch, whatever part of it is computed.
        """
        clips = self.normalize(batch.clips.to(device, non_blocking=True))  # (B, C, T, H, W)
        labels = batch.labels.to(device, non_blocking=True)
        mixed, targets = (x[batch.part] for x in self._mix(clips, labels, int(batch.seeds[0]) ^ self.seed))
        labels = labels[batch.part]
        logits = model(mixed)  # (B, K)
        per_sample = soft_cross_entropy(logits, targets)
        top1 = (logits.detach().argmax(dim=-1) == labels).float().mean()
        return LossOutput(loss=per_sample.mean(), per_sample=per_sample.detach(), metrics={"train_top1": top1})

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1 and top-5 on the evaluation split, one view a video."""
        return self.evaluate(model, step)

    def pictures(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Fine-tuning has none."""
        return {}

    def info(self) -> dict[str, Any]:
        """For model.json."""
        return dict(self._describe)


def build_classifier(
    source: str | None, settings: Settings, classes: list[str]
) -> tuple[Classifier, dict[str, Any], str | None]:
    """The classifier before its first step.

    The head of a classifier is kept where it was trained on the same classes, or has no names and their number (an
    import); otherwise a new one is drawn by the seed.

    Returns:
        The model, model.json's info of where it came from, and a line to say about the head (None from scratch).
    """
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
            if built.attention is not None and model.attention is not None:
                built.attention.load_state_dict(model.attention.state_dict())
            line = "Head: kept from the checkpoint, which has the same classes."
            if not names:
                line = f"Head: kept from the checkpoint, which has {len(classes)} classes without names."
    return built, dict(model.info), line


def quick_accuracy(
    model: nn.Module, settings: Settings, processes: Distributed, normalize: Callable[[Tensor], Tensor], batch: int
) -> dict[str, float]:
    """Loss, top-1 and top-5 on the evaluation split, one centre view a video. A collective."""
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

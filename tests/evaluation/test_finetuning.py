"""Fine-tuning against its references: timm's layer decay and targets, Hugging Face's VideoMAE."""

from __future__ import annotations

from pathlib import Path

import diffmae_video.compat  # noqa: F401

import pytest
import timm
import torch
from timm.data.mixup import mixup_target
from timm.optim import param_groups_layer_decay

from diffmae_video.config import FinetuneSettings, ModelSettings
from diffmae_video.data.stream import Batch
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.patches import normalize_pixels
from diffmae_video.training.finetuning import FinetuneTask, freeze_first, soft_cross_entropy
from diffmae_video.training.optim import parameter_groups

TINY = ModelSettings(preset="nano", width=48, depth=3, heads=3, frames=4, size=(32, 32))


def classifier(classes: int = 5, **options) -> Classifier:
    return Classifier(Encoder(TINY, seed=1), classes, head_init=0.5, seed=2, **options)


def test_layer_decay_groups_equal_timms_for_the_same_vit() -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=3, num_heads=3, num_classes=5, class_token=False, global_pool="avg"
    )
    ours = classifier()

    def scales(model: torch.nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
        names = {id(parameter): name.removeprefix("encoder.") for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)].replace("fc_norm", "norm"): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }

    expected = scales(theirs, param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.65))
    expected.pop("pos_embed")  # ours are fixed
    assert scales(ours, parameter_groups(ours, 0.05, 0.65)) == expected


def batch_of(count: int = 6, classes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (count, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return Batch(clips, labels, [str(i) for i in range(count)], torch.arange(count), torch.arange(count) + 7)


def task_of(settings: FinetuneSettings, **options) -> FinetuneTask:
    return FinetuneTask(
        classifier(),
        settings,
        classes=5,
        normalize=lambda clips: normalize_pixels(clips, "symmetric"),
        describe={"classes": list("abcde")},
        evaluate=lambda model, step: {"val_top1": 0.5},
        **options,
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_loss_is_the_cross_entropy_of_timms_targets(mixup: float, cutmix: float) -> None:
    """The model sees mixed clips; what share of each was mixed is read off them, and gives timm's targets."""
    batch = batch_of()
    task = task_of(FinetuneSettings(mixup=mixup, cutmix=cutmix, smoothing=0.1))
    seen = []

    def model(clips: torch.Tensor) -> torch.Tensor:
        seen.append(clips)
        return task.model(clips)

    output = task.loss(model, batch, torch.device("cpu"))
    clips = normalize_pixels(batch.clips, "symmetric")
    other, mixed = clips.flip(0), seen[0]
    apart = (clips - other).abs() > 1e-3
    share = ((mixed - other) / (clips - other))[apart]  # of the own clip: constant for mixup, 0 or 1 for CutMix
    if (share - share.round()).abs().max() < 1e-3 and cutmix:
        assert set(share.round().unique().tolist()) <= {0.0, 1.0}
        first = (share.round() == 1).float().mean()
        one_frame = (mixed == clips).all(2).all(1).float().mean((1, 2))  # the same box in every frame
        assert torch.allclose(one_frame, one_frame[0].expand(6), atol=0.05)
        lam = one_frame[0].item()
        assert abs(lam - first.item()) < 0.05
    else:
        lam = share.median().item()
        assert mixup or lam == 1.0
    expected = -(mixup_target(batch.labels, 5, lam, 0.1) * task.model(mixed).log_softmax(-1)).sum(-1)
    assert torch.allclose(output.per_sample, expected, atol=0.02)
    assert output.loss.item() == pytest.approx(output.per_sample.mean().item())
    again = task.loss(task.model, batch, torch.device("cpu"))
    assert torch.equal(again.per_sample, output.per_sample)  # a function of the batch's seeds


def test_soft_cross_entropy_equals_torchs() -> None:
    logits, labels = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(soft_cross_entropy(logits, mixup_target(labels, 5, 1.0, 0.2)).double(), expected, atol=1e-5)


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_freezing(blocks: int) -> None:
    model = classifier()
    count = freeze_first(model, blocks)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {f"encoder.blocks.{i}." for i in range(blocks)} | ({"encoder.patch_embed."} if blocks else set())
    assert {name for name, _ in model.named_parameters() if name.startswith(tuple(expected))} == frozen
    assert count == sum(parameter.numel() for name, parameter in model.named_parameters() if name in frozen)
    with pytest.raises(ValueError, match="3 blocks"):
        freeze_first(classifier(), 4)


def test_finetuning_from_a_transformers_videomae_starts_with_its_logits(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    from diffmae_video.config import Settings, with_overrides
    from diffmae_video.models.importers import import_weights
    from diffmae_video.models.weights import save_model
    from diffmae_video.training.finetuning import build_classifier

    torch.manual_seed(0)
    config = VideoMAEConfig(
        **{"image_size": 32, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3},
        **{"intermediate_size": 192, "num_labels": 5, "use_mean_pooling": True},
    )
    theirs = VideoMAEForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # no bias left at zero
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "hf")
    imported = import_weights("hf-videomae", tmp_path / "hf" / "model.safetensors")
    save_model(imported, tmp_path / "run")
    settings = with_overrides(Settings(model=imported.settings), finetune={"drop_path": 0.0})
    ours, _, line = build_classifier(str(tmp_path / "run"), settings, list("abcde"))
    assert "kept" in line
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = theirs(clips.transpose(1, 2)).logits
        assert torch.allclose(ours.eval()(clips), expected, atol=1e-5)
        assert expected.std() > 0.1

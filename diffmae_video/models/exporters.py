"""Weights for other projects, each export with a model card (README.md)."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.files import write_atomic
from diffmae_video.models.card import class_names, model_card
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.patches import PIXEL_NORMS
from diffmae_video.models.weights import save_model

FORMATS = ("safetensors", "timm", "hf", "onnx")

TO_HF: tuple[tuple[str, str], ...] = (
    (r"^patch_embed\.proj\.", "{body}.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "{body}.embeddings.cls_token"),
    (r"^pos_embed$", "{body}.embeddings.position_embeddings"),
    (r"^blocks\.", "{body}.encoder.layer."),
    (r"^norm\.", "{body}.layernorm."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"attn\.proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"^head\.", "classifier."),
)
TO_VIDEOMAE = (
    (r"^decoder_embed\.", "encoder_to_decoder."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
)
TO_VITMAE = ((r"^mask_token$", "decoder.mask_token"), (r"^(decoder_(?:embed|pos_embed|norm|pred))", r"decoder.\1"))


def export_model(
    model: DiffMAE | Classifier, directory: Path | str, form: str, licence: str = "unknown", overwrite: bool = False
) -> list[Path]:
    """Write a model and its card into a new directory, whole or not at all.

    Args:
        form: `safetensors` (ours: weights.safetensors and model.json), `timm` (images), `hf` (VideoMAE or ViTMAE), or
            `onnx` (clips to logits, or to tokens without a head).
        licence: named on the card; the weights inherit it from their training data.
        overwrite: replace a directory that is there.

    Returns:
        The files written.

    Raises:
        UsageError: the format cannot hold this model, or the directory is taken.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: choose one of {', '.join(FORMATS)}.")
    if form in ("timm", "hf") and model.settings.positions == "rotary":
        raise UsageError(f"--format {form} has no rotary positions; export this model as safetensors or onnx.")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise UsageError(f"--out {directory} is not empty; choose a new folder or pass --overwrite.")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        {"safetensors": save_model, "timm": _write_timm, "hf": _write_hf, "onnx": _write_onnx}[form](model, temporary)
        write_atomic(temporary / "README.md", model_card(model, form, licence))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(directory.iterdir())


def mae_names(model: DiffMAE | Classifier) -> dict[str, Tensor]:
    """Our tensors under mae's names, positions joined into tables with a slot for the class token."""
    settings, encoder = model.settings, model.encoder
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".positions." in name or name == "decoder.class_position":
            continue
        name = name.removeprefix("encoder.")
        name = name.replace("decoder.latent_embed.", "decoder_embed.").replace("decoder.head.", "decoder_pred.")
        name = "mask_token" if name == "decoder.mask_token" else name.replace("decoder.", "decoder_", 1)
        out[name] = tensor.detach().clone()
    for prefix, module in (("", encoder), ("decoder_", getattr(model, "decoder", None))):
        if module is None:
            continue
        table = module.positions(encoder.shape).detach()  #              (1, N, D)
        if settings.class_token:
            place = getattr(module, "class_position", None)
            place = torch.zeros_like(table[:, :1]) if place is None else place.detach()
            table = torch.cat([place, table], 1)  #                      (1, 1 + N, D)
        out[f"{prefix}pos_embed"] = table.contiguous()
    return out


def _write_timm(model: DiffMAE | Classifier, directory: Path) -> None:
    settings, encoder = model.settings, model.encoder
    if encoder.shape[0] != 1 or getattr(model, "pool", "") == "attentive":
        raise UsageError(
            "--format timm holds image ViTs with mean or class pooling; export this model as safetensors or onnx."
        )
    tensors = {name: tensor for name, tensor in mae_names(model).items() if not name.startswith(("decoder", "mask_"))}
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].sum(2)  # an image repeats in its tubelet
    mean_pool = isinstance(model, Classifier) and model.pool == "mean"
    if mean_pool:
        tensors = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in tensors.items()}
    for name in ("layer_norm_eps", "encoder_norm_eps"):
        if getattr(settings, name) not in (None, 1e-6):
            raise UsageError(
                f"--format timm: timm's ViT has a LayerNorm epsilon of 1e-6, and this model's {name} is "
                f"{getattr(settings, name)}; export it as safetensors or onnx."
            )
    mean, std = PIXEL_NORMS[settings.pixel_norm]
    pool = "avg" if mean_pool else "token" if settings.class_token else ""
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": model.num_classes if isinstance(model, Classifier) else 0,
        "global_pool": pool,
        "model_args": {
            "global_pool": pool,  # what timm builds from; the one above is for its hub's pages
            "img_size": list(settings.size),
            "patch_size": settings.patch,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": settings.mlp_ratio,
            "qkv_bias": settings.qkv_bias,
            "class_token": settings.class_token,
        },
        "pretrained_cfg": {"mean": mean, "std": std, "input_size": [3, *settings.size], "fixed_input_size": True},
    }
    _write_tensors(tensors, directory)
    write_atomic(directory / "config.json", json.dumps(config, indent=2))


def _write_hf(model: DiffMAE | Classifier, directory: Path) -> None:
    settings, encoder = model.settings, model.encoder
    mae = isinstance(model, DiffMAE) and settings.objective == "mae" and settings.decoder == "joint"
    video = encoder.shape[0] > 1
    fits = settings.size[0] == settings.size[1] and settings.qkv_bias and not settings.decoder_class
    if video:
        fits &= settings.positions == "flat" and not settings.class_token
        fits &= mae or (isinstance(model, Classifier) and model.pool == "mean" and model.num_classes > 0)
    else:
        fits &= mae and settings.class_token and settings.tubelet == 1
    if not fits:
        raise UsageError(
            "--format hf holds VideoMAE (square clips, positions = 'flat', no class token, a mean-pooled head or the "
            "joint decoder of objective 'mae') and ViTMAE (images with a class token and that decoder, tubelet = 1); "
            f"export this model as safetensors{'' if video else ', timm'} or onnx."
        )
    fixed = {"encoder_norm_eps": video, "decoder_norm_eps": mae}  # transformers takes 1e-5 there, or the common one
    for name, concerned in fixed.items():
        value = getattr(settings, name) or settings.layer_norm_eps
        if concerned and value > 1e-5:
            raise UsageError(
                f"--format hf: transformers' epsilon of that LayerNorm is 1e-5, and this model's {name} is {value}; "
                "export it as safetensors or onnx."
            )
    tensors: dict[str, Tensor] = {}
    rules = TO_HF + (TO_VIDEOMAE if video else TO_VITMAE)
    for name, tensor in mae_names(model).items():
        if video and name.endswith("pos_embed"):  # VideoMAE computes its own, positions = 'flat'
            continue
        if name == "patch_embed.proj.weight" and not video:
            tensor = tensor.squeeze(2)  # ViTMAE's kernel has no time
        if isinstance(model, Classifier) and name.startswith("norm."):
            name = f"fc_{name}"
        elif name == "decoder_embed.bias" and video:
            if bool(tensor.any()):
                raise UsageError("--format hf: VideoMAE has no encoder_to_decoder.bias, and this model does; use onnx.")
            continue
        split = re.match(r"(.*)attn\.qkv\.(weight|bias)$", name)
        parts = {name: tensor}
        if split:  # query, key, value
            values = tensor.chunk(3)
            parts = {
                f"{split[1]}attn.{p}.{split[2]}": v for p, v in zip(("query", "key", "value"), values, strict=True)
            }
        for part, value in parts.items():
            for pattern, replacement in rules:
                part = re.sub(pattern, replacement.format(body="videomae" if video else "vit"), part)
            part = re.sub(r"attn\.(query|key|value)\.", r"attention.attention.\1.", part)
            if video and part.endswith("key.bias"):  # it shifts a softmax row by a constant: no effect
                continue
            if video:
                part = re.sub(r"(query|value)\.bias$", lambda m: f"{m[1][0]}_bias", part)
            tensors[part] = value.contiguous()
    kind = "ForPreTraining" if mae else "ForVideoClassification"
    config: dict[str, Any] = {
        "architectures": [("VideoMAE" if video else "ViTMAE") + kind],
        "model_type": "videomae" if video else "vit_mae",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.width * settings.mlp_ratio),
        "layer_norm_eps": settings.layer_norm_eps,
        "image_size": settings.size[0],
        "patch_size": settings.patch,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "norm_pix_loss": settings.target in ("norm_pixel", "norm_pixel_channel"),
    }
    if video:
        config |= {"num_frames": settings.frames, "tubelet_size": settings.tubelet, "use_mean_pooling": not mae}
    if mae:
        config |= {
            "decoder_hidden_size": settings.decoder_width,
            "decoder_num_hidden_layers": settings.decoder_depth,
            "decoder_num_attention_heads": settings.decoder_heads,
            "decoder_intermediate_size": int(settings.decoder_width * settings.mlp_ratio),
        }
    else:
        names = class_names(model)
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    _write_tensors(tensors, directory)
    write_atomic(directory / "config.json", json.dumps(config, indent=2))
    write_atomic(directory / "preprocessor_config.json", json.dumps(_processor(settings, video), indent=2))


def _processor(settings: ModelSettings, video: bool) -> dict[str, Any]:
    """What transformers' image processors do to bring frames to the model: resize, cut out the centre, normalise."""
    mean, std = PIXEL_NORMS[settings.pixel_norm]
    size = {"height": settings.size[0], "width": settings.size[1]}
    return {
        "image_processor_type": "VideoMAEImageProcessor" if video else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": settings.size[0]} if video else size,
        "resample": 2,  # bilinear, as our transforms
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    } | ({"do_center_crop": True, "crop_size": size} if video else {})


def _write_tensors(tensors: dict[str, Tensor], directory: Path) -> None:
    # safetensors' own save_file makes a file that its owner alone can read
    write_atomic(directory / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _write_onnx(model: DiffMAE | Classifier, directory: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("--format onnx needs onnxscript: pip install onnx onnxscript.") from error
    settings = model.settings
    network: nn.Module = model if isinstance(model, Classifier) else model.encoder
    training = network.training
    clips = torch.zeros(2, 3, settings.frames, *settings.size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter about its own parts
        program = torch.onnx.export(
            network.eval(),
            (clips,),
            dynamo=True,
            input_names=["clips"],
            output_names=["logits" if isinstance(model, Classifier) and model.num_classes else "tokens"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    network.train(training)
    assert program is not None  # the exporter of torch.export always gives one
    program.save(str(directory / "model.onnx"))

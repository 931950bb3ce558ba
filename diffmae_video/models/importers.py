"""Weights of other projects: recognised by their names, renamed, checked tensor by tensor.

Known: facebookresearch/mae and mae_st (split or fused qkv, joint or separate positions, PySlowFast containers),
VideoMAE and VideoMAEv2, timm ViTs, Hugging Face ViTMAE and VideoMAE (key names of transformers 4 and 5). Each dialect
is renamed to the names of mae (`blocks.0.attn.qkv.weight`, `decoder_blocks.0...`), and those to ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmae_video.config import ModelSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.tensors import Tensors, read_tensors, tensor_problems
from diffmae_video.models.weights import DESCRIPTION, WEIGHTS, load_model

SOURCES = ("auto", "mae", "mae_st", "videomae", "timm", "hf-vitmae", "hf-videomae")

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # published ViTs, by width

RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^(module\.|model\.|backbone\.|vit\.|videomae\.)+", ""),
    (r"^embeddings\.(cls_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer|blocks)\.", "decoder_blocks."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^encoder\.", ""),  # VideoMAE
    (r"attention\.attention\.(query|key|value)\.", lambda m: f"attn.{m[1][0]}."),
    (r"attention\.attention\.([qv]_bias)", r"attn.\1"),
    (r"attention\.([qkv])_proj\.", r"attn.\1."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^head\.projection\.", "head."),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.norm\.", "decoder_norm."),
    (r"^decoder\.head\.", "decoder_pred."),
    (r"^decoder\.(mask_token|decoder_)", r"\1"),
    (r"^pred_head\.projections\.0\.", "decoder_pred."),
    (r"^pred_head\.transforms\.0\.(\d+)\.(weight|bias)$", r"decoder_norm.\2"),
    (r"^pred_head\.transforms\.0\.", "decoder_blocks."),
)


def detect_source(tensors: Tensors) -> str:
    """Which project tensors come from, judged by their names and shapes."""
    names = set(tensors)
    if any(name.startswith(("vit.embeddings", "decoder.decoder_pos_embed")) for name in names):
        return "hf-vitmae"
    if any(name.startswith("videomae.") for name in names):
        return "hf-videomae"
    bare = {re.sub(r"^(module\.|model\.|backbone\.)+", "", name): tensor.dim() for name, tensor in tensors.items()}
    if "encoder.patch_embed.proj.weight" in bare:
        return "videomae"
    if "patch_embed.proj.weight" not in bare:
        raise DataError("These tensors are of no known project (no patch embedding is among them); name a ViT's file.")
    if bare["patch_embed.proj.weight"] == 5:
        return "mae_st" if "cls_token" in bare or any("pos_embed" in name for name in bare) else "videomae"
    return "mae" if any(name.startswith(("decoder_", "mask_token")) for name in bare) else "timm"


def canonical_names(tensors: Tensors) -> Tensors:
    """Rename any known dialect to mae's names, with fused qkv (a missing key bias is zero)."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    out = dict(renamed)
    for name in renamed:
        block = name.removesuffix("attn.q.weight")
        if block != name:
            out[f"{block}attn.qkv.weight"] = torch.cat([out.pop(f"{block}attn.{part}.weight") for part in "qkv"])
            if f"{block}attn.k.bias" in out:
                out[f"{block}attn.qkv.bias"] = torch.cat([out.pop(f"{block}attn.{part}.bias") for part in "qkv"])
            elif f"{block}attn.q.bias" in out:
                out[f"{block}attn.q_bias"] = out.pop(f"{block}attn.q.bias")
                out[f"{block}attn.v_bias"] = out.pop(f"{block}attn.v.bias")
    for name in list(out):
        block = name.removesuffix("attn.q_bias")
        if block != name:
            query, value = out.pop(name), out.pop(f"{block}attn.v_bias")
            out[f"{block}attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return out


def import_weights(
    source: str,
    file: Path | str,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    inflate: str = "central",
    allow_partial: bool = False,
) -> DiffMAE | Classifier:
    """Build our model from another project's weights.

    A file with a decoder becomes a DiffMAE with objective `mae`, one with a head a Classifier, and an encoder alone a
    Classifier without head (pooled features; its `.encoder` can be fine-tuned).

    Args:
        source: one of SOURCES; `auto` looks at the names.
        file: .safetensors, .pth, or a Hugging Face folder (its config.json is read for heads and sizes).
        frames: T of the model; 16 for video weights that do not say. More than 1 for 2-D weights inflates them.
        size: (H, W) where the weights do not say; 224 x 224 by default.
        heads: encoder heads, where the width is not that of a published ViT.
        decoder_heads: decoder heads; else the habit of the source.
        inflate: how 2-D kernels become 3-D: `central` (the middle frame sees) or `mean` (an image keeps its tokens).
        allow_partial: keep initial values for what is missing and drop what does not fit, instead of an error.

    Raises:
        UsageError: an unknown source, or a file of another one.
        DataError: damaged or unsafe files; tensors that do not fit (all are listed).
    """
    if source not in SOURCES:
        raise UsageError(f"SOURCE {source}: choose one of {', '.join(SOURCES)}.")
    if inflate not in ("central", "mean"):
        raise UsageError(f"--inflate {inflate}: choose central or mean.")
    raw = read_tensors(file)
    found = detect_source(raw)
    if source not in ("auto", found) and not (source, found) == ("mae", "timm"):  # MAE's encoders carry timm's names
        raise UsageError(f"{file} looks like weights of {found}, not of {source}; correct SOURCE, or give auto.")
    known = found if source == "auto" else source
    config = _read_config(Path(file))
    settings, converted = translate(raw, known, frames, size, heads, decoder_heads, inflate, config)
    model = build(settings, converted, found)
    problems = tensor_problems(model, converted)
    if problems and not allow_partial:
        raise DataError(
            f"{file} does not fit: {'; '.join(problems)}; --allow-partial keeps initial values for what is missing."
        )
    own = model.state_dict()
    fitting = {name: value for name, value in converted.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    model.info = {"imported_from": found, "file": Path(file).name, "problems": problems}
    return model


def translate(
    raw: Tensors,
    source: str,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    inflate: str = "central",
    config: dict[str, Any] | None = None,
) -> tuple[ModelSettings, Tensors]:
    """Settings that another project's tensors ask for, and the tensors under our names.

    Args:
        raw: by their own names.
        source: one of SOURCES but `auto`.
        frames: as the other options, see `import_weights`.
        config: Hugging Face's config.json.
    """
    config = config or {}
    slowfast = any(name.removeprefix("module.").startswith("pred_head.") for name in raw)
    tensors = canonical_names(raw)
    geometry = _Geometry(tensors, frames, size, config)
    tensors = geometry.inflate(tensors, inflate)
    settings = _settings(source, tensors, geometry, config, heads, decoder_heads, slowfast)
    return settings, to_ours(tensors, settings)


class _Geometry:
    """Sizes that tensors tell: tubelet, patch, frames, height and width."""

    def __init__(self, tensors: Tensors, frames: int | None, size: tuple[int, int] | None, config: dict) -> None:
        if "patch_embed.proj.weight" not in tensors:
            raise DataError("There is no patch embedding among the tensors; give a ViT's checkpoint.")
        kernel = tensors["patch_embed.proj.weight"]
        self.width, self.patch = kernel.shape[0], kernel.shape[-1]
        self.flat_image = kernel.dim() == 4
        self.inflated = self.flat_image and (frames or 1) > 1
        self.tubelet = 2 if self.inflated else 1 if self.flat_image else kernel.shape[2]
        side = config.get("image_size", 224)
        height, width = size or ((side, side) if isinstance(side, int) else tuple(side))
        times = max(1, (frames or config.get("num_frames") or 16) // self.tubelet)
        if self.flat_image:
            times = (frames or 1) // self.tubelet or 1
        classes = 1 if "cls_token" in tensors else 0
        if "pos_embed_spatial" in tensors:
            height = width = self.patch * math.isqrt(tensors["pos_embed_spatial"].shape[1])
            times = tensors["pos_embed_temporal"].shape[1]
        elif "pos_embed" in tensors:
            count = tensors["pos_embed"].shape[1]
            if self.flat_image:
                count -= "cls_token" in tensors and math.isqrt(count) ** 2 != count
                height = width = self.patch * math.isqrt(count)
            else:
                height = width = self.patch * math.isqrt((count - classes) // times)
        self.frames, self.size = (1 if self.flat_image and not self.inflated else times * self.tubelet), (height, width)
        self.shape = (times, height // self.patch, width // self.patch)

    def inflate(self, tensors: Tensors, how: str) -> Tensors:
        """2-D kernels as 3-D ones: of one frame, or spread over a tubelet."""
        if not self.flat_image:
            return tensors
        kernel = tensors["patch_embed.proj.weight"].unsqueeze(2)  # (D, C, 1, p, p)
        if self.inflated and how == "mean":
            kernel = kernel.repeat(1, 1, self.tubelet, 1, 1) / self.tubelet
        elif self.inflated:
            kernel = torch.cat([torch.zeros_like(kernel)] * (self.tubelet - 1) + [kernel], 2)
        # the decoder, if any, predicts single frames: each of the tubelet's starts as a copy
        copies = {
            name: tensors[name].repeat(self.tubelet, *[1] * (tensors[name].dim() - 1))
            for name in ("decoder_pred.weight", "decoder_pred.bias")
            if name in tensors and self.inflated
        }
        return {**tensors, **copies, "patch_embed.proj.weight": kernel}


def _read_config(path: Path) -> dict[str, Any]:
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{config} cannot be read ({error}); download it again.") from error
    return content if isinstance(content, dict) and "hidden_size" in content else {}


def _count(tensors: Tensors, prefix: str) -> int:
    found = {int(match[1]) for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))}
    return max(found) + 1 if found else 0


def _settings(
    source: str,
    tensors: Tensors,
    geometry: _Geometry,
    config: dict[str, Any],
    heads: int | None,
    decoder_heads: int | None,
    slowfast: bool,
) -> ModelSettings:
    width = geometry.width
    heads = heads or config.get("num_attention_heads") or HEADS.get(width)
    if heads is None:
        raise UsageError(f"Weights of width {width} do not tell their number of heads; give --heads.")
    decoder_depth = _count(tensors, "decoder_blocks")
    fields: dict[str, Any] = {
        "preset": "base",
        "width": width,
        "depth": max(1, _count(tensors, "blocks")),
        "heads": heads,
        "frames": geometry.frames,
        "size": geometry.size,
        "tubelet": geometry.tubelet,
        "patch": geometry.patch,
        "class_token": "cls_token" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6),
        "pixel_norm": "kinetics" if source == "mae_st" else "imagenet",
        "positions": "flat" if "pos_embed" not in tensors and "pos_embed_spatial" not in tensors else "learned",
    }
    if fields["positions"] == "learned" and not geometry.flat_image:
        tables = [name for name in ("pos_embed", "decoder_pos_embed") if name in tensors]
        fields["positions"] = "joint" if tables else "learned"
    if "blocks.0.mlp.fc1.weight" in tensors:
        fields["mlp_ratio"] = tensors["blocks.0.mlp.fc1.weight"].shape[0] / width
    if config and "head.weight" in tensors:
        fields["encoder_norm_eps"] = 1e-5
    if decoder_depth:
        decoder_width = tensors["decoder_pred.weight"].shape[1]
        habit = {640: 8}.get(decoder_width, max(1, decoder_width // 64))
        if source in ("mae", "mae_st", "hf-vitmae") and not slowfast:
            habit = 16
        fields |= {
            "decoder": "joint",
            "objective": "mae",
            "target": "norm_pixel",
            "timestep": "none",
            "decoder_depth": decoder_depth,
            "decoder_width": decoder_width,
            "decoder_heads": decoder_heads or config.get("decoder_num_attention_heads") or habit,
            "decoder_class": "decoder_cls_token" in tensors,
        }
        if source == "hf-videomae":
            fields["decoder_norm_eps"] = 1e-5
    return ModelSettings.model_validate(fields)


def to_ours(tensors: Tensors, settings: ModelSettings) -> Tensors:
    """mae's names to ours; class positions are added to class tokens, which have no place here."""
    tensors = dict(tensors)
    out: Tensors = {}
    times = max(1, settings.frames // settings.tubelet)
    for prefix, ours in (("", "encoder."), ("decoder_", "decoder.")):
        place = _positions(tensors, prefix, times, settings.positions)
        token = tensors.pop(f"{prefix}cls_token", None)
        at_class = place.pop("class", None)
        if token is not None:
            out[f"{ours}cls_token"] = token if at_class is None else token + at_class
        elif at_class is not None and bool(at_class.any()):
            out[f"{ours}positions.class"] = at_class  # no such place here: it will be listed as unexpected
        out |= {f"{ours}positions.{name}": table for name, table in place.items()}
    for name, tensor in tensors.items():
        if name == "mask_token":
            name = "decoder.mask_token"
        elif name.startswith("decoder_embed."):
            name = name.replace("decoder_embed.", "decoder.latent_embed.")
        elif name.startswith("decoder_pred."):
            name = name.replace("decoder_pred.", "decoder.head.")
            frame = settings.patch**2 * 3
            if tensor.shape[0] == frame and settings.tubelet > 1:  # MAE-ST predicts one frame of a tubelet: copy it
                tensor = tensor.repeat(settings.tubelet, *[1] * (tensor.dim() - 1))
        elif name.startswith("decoder_"):
            name = name.replace("decoder_", "decoder.", 1)
        elif name.startswith(("blocks.", "patch_embed.", "norm.")):
            name = f"encoder.{name}"
        elif name.startswith("fc_norm."):
            name = name.replace("fc_norm.", "encoder.norm.")
        out[name] = tensor
    if settings.decoder == "joint" and "decoder.latent_embed.weight" in out:  # VideoMAE's has no bias
        out.setdefault("decoder.latent_embed.bias", torch.zeros(settings.decoder_width))
    return out


def _positions(tensors: Tensors, prefix: str, times: int, kind: str) -> Tensors:
    """Take the position tables of encoder or decoder out of `tensors`, as ours: spatial and temporal, or joint."""
    if f"{prefix}pos_embed_spatial" in tensors:
        spatial = tensors.pop(f"{prefix}pos_embed_spatial")  #   (1, S, D)
        temporal = tensors.pop(f"{prefix}pos_embed_temporal")  # (1, T/t, D)
        place = {"class": tensors.pop(f"{prefix}pos_embed_class", None)}
        if kind == "joint":
            return place | {"joint": (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)}
        return place | {"spatial": spatial, "temporal": temporal}
    table = tensors.pop(f"{prefix}pos_embed", None)
    if table is None:
        return {}
    count = table.shape[1] // times * times if kind == "joint" else math.isqrt(table.shape[1]) ** 2
    classes = table.shape[1] - count
    place = {"class": table[:, :1] if classes else None}
    if kind == "joint":
        return place | {"joint": table[:, classes:]}
    return place | {"spatial": table[:, classes:], "temporal": torch.zeros(1, times, table.shape[2])}


def build(settings: ModelSettings, converted: Tensors, source: str) -> DiffMAE | Classifier:
    """The model, with initial weights, that holds such tensors; `source` tells what a class token is for."""
    if any(name.startswith("decoder.") for name in converted):
        return DiffMAE(settings)
    classes = converted["head.weight"].shape[0] if "head.weight" in converted else 0
    pool = "class" if source == "timm" and settings.class_token and "fc_norm.weight" not in converted else "mean"
    return Classifier(Encoder(settings), classes, pool=pool)


def load_pretrained(path: Path | str, source: str = "auto", **options: Any) -> nn.Module:
    """Any weights: our own folder (`model.json` is in it), or another project's file through `import_weights`."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    own = (folder / DESCRIPTION).is_file() and (Path(path).is_dir() or Path(path).name == WEIGHTS)
    return load_model(path) if own else import_weights(source, path, **options)

"""Weights of other projects: recognised by their names, renamed, checked tensor by tensor.

Names become mae's (`dialects`), sizes are told by the tensors (`geometry`) and the rest of the settings by a
configuration beside them; then mae's names become ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffmae_video.config import ModelSettings
from diffmae_video.errors import DataError, UsageError
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.dialects import SOURCES, WRAPPERS, canonical_names, detect_source
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.geometry import Geometry
from diffmae_video.models.patches import PIXEL_NORMS
from diffmae_video.models.tensors import Tensors, read_tables, tensor_file, tensor_problems
from diffmae_video.models.weights import DESCRIPTION, WEIGHTS, load_model

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # published ViTs, by width


def import_weights(
    source: str,
    file: Path | str,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    inflate: str | None = None,
    allow_partial: bool = False,
    key: str | None = None,
    target: str | None = None,
    classes: Sequence[str] | None = None,
) -> DiffMAE | Classifier:
    """Build our model from another project's weights.

    A file with a decoder becomes a DiffMAE with objective `mae`, one with a head a Classifier, and an encoder alone a
    Classifier without head (pooled features; its `.encoder` can be fine-tuned).

    Args:
        source: one of SOURCES; `auto` looks at the names.
        file: .safetensors, .pth, or a folder of Hugging Face's or timm's (its config.json is read too).
        frames: T of the model; 16 for video weights that do not say. More than 1 for 2-D weights inflates them.
        size: (H, W) where the weights do not say; 224 x 224 by default.
        heads: encoder heads, where the width is not that of a published ViT.
        decoder_heads: decoder heads; else the habit of the source.
        inflate: how 2-D kernels become 3-D: `central` (the middle frame sees; the default) or `mean` (an image keeps
            its tokens).
        allow_partial: keep initial values for what is missing and drop what does not fit, instead of an error.
        key: table of a PyTorch file that holds several, for example `model_ema`.
        target: what the decoder predicts, where the file does not say: `pixel` for MAE's weights for pictures.
        classes: names of the head's classes, in its order; else those of a Hugging Face folder.

    Raises:
        UsageError: an unknown source, or a file of another one.
        DataError: damaged or unsafe files; tensors that do not fit (all are listed).
    """
    if source not in SOURCES:
        raise UsageError(f"SOURCE {source}: choose one of {', '.join(SOURCES)}.")
    if inflate not in (None, "central", "mean"):
        raise UsageError(f"--inflate {inflate}: choose central or mean.")
    raw, taken, others = read_tables(file, key)
    damaged = [name for name, tensor in raw.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if damaged:
        raise DataError(f"{file}: {damaged[0]} holds values that are no numbers; ask for an undamaged checkpoint.")
    found = detect_source(raw)
    if source not in ("auto", found) and not (source, found) == ("mae", "timm"):  # MAE's encoders carry timm's names
        raise UsageError(f"{file} looks like weights of {found}, not of {source}; correct SOURCE, or give auto.")
    known = found if source == "auto" else source
    config = _read_config(Path(file))
    pool = _pool(raw, found, config, str(file))
    settings, converted = translate(raw, known, frames, size, heads, decoder_heads, inflate, config)
    if target is not None:
        if not any(name.startswith("decoder.") for name in converted):
            raise UsageError(f"--target {target}: {file} has no decoder, which alone has a target; leave it out.")
        settings = settings.model_copy(update={"target": target})
        settings = ModelSettings.model_validate(settings.model_dump())
    model = build(settings, converted, pool)
    problems = tensor_problems(model, converted)
    if problems and not allow_partial:
        raise DataError(
            f"{file} does not fit: {'; '.join(problems)}; --allow-partial keeps initial values for what is missing."
        )
    own = model.state_dict()
    fitting = {name: value for name, value in converted.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    model.info = {"imported_from": found, "file": Path(file).name, "problems": problems}
    if taken is not None:
        model.info["key"] = taken
    if others:
        model.info["other_tables"] = others
    names = list(classes) if classes is not None else _class_names(config)
    if isinstance(model, Classifier) and model.num_classes and names:
        if len(names) != model.num_classes:
            raise UsageError(
                f"--classes: {len(names)} names for the {model.num_classes} classes of {file}; give one a class."
            )
        model.info["classes"] = names
    elif classes is not None:
        raise UsageError(f"--classes: {file} has no head that they could name; leave it out.")
    return model


def _class_names(config: dict[str, Any]) -> list[str]:
    """Names of a Hugging Face config's id2label; none where they only say LABEL_0, LABEL_1, ..."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        return []
    names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    return [] if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _pool(raw: Tensors, source: str, config: dict[str, Any], file: str) -> str:
    """How the classifier of such tensors pools: `mean` of the patches or the `class` token.

    MAE, VideoMAE and timm rename the last norm to `fc_norm` where it acts behind a mean; a class token with a `norm`
    before the head is classified by that token. mae_st averages patches and calls the norm `norm`.

    Raises:
        DataError: a way of pooling that this model does not have.
    """
    if config.get("use_mean_pooling") is False and any(
        WRAPPERS.sub("", name).startswith("classifier.") for name in raw
    ):
        raise DataError(
            f"{file} classifies by its first patch (use_mean_pooling = false), which this model cannot do; fine-tune "
            "its encoder, or take a checkpoint with mean pooling."
        )
    names = set(canonical_names(raw))
    if config.get("global_pool") == "avg" and "fc_norm.weight" not in names and "norm.weight" in names:
        raise DataError(
            f"{file} averages tokens behind their norm (timm's fc_norm = false), which this model cannot do; take a "
            "checkpoint with fc_norm."
        )
    averages = source not in ("timm", "mae") or "fc_norm.weight" in names or "cls_token" not in names
    return "mean" if averages else "class"


def translate(
    raw: Tensors,
    source: str,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    inflate: str | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[ModelSettings, Tensors]:
    """Settings that another project's tensors ask for, and the tensors under our names.

    Args:
        raw: by their own names.
        source: one of SOURCES but `auto`.
        frames: as the other options, see `import_weights`.
        config: config.json of Hugging Face or timm.
    """
    config = config or {}
    slowfast = any(name.removeprefix("module.").startswith("pred_head.") for name in raw)
    tensors = canonical_names(raw)
    geometry = Geometry(tensors, frames, size, config)
    tensors = geometry.inflate(tensors, inflate)
    settings = _settings(source, tensors, geometry, config, heads, decoder_heads, slowfast)
    return settings, to_ours(tensors, settings)


def _read_config(path: Path) -> dict[str, Any]:
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{config} cannot be read ({error}); download it again.") from error
    if not isinstance(content, dict):
        return {}
    if "hidden_size" in content:
        return content
    if "architecture" not in content:
        return {}
    args = content.get("model_args")  # timm's
    args = args if isinstance(args, dict) else {}
    known = {"num_heads": "num_attention_heads", "img_size": "image_size", "global_pool": "global_pool"}
    told = {ours: args[name] for name, ours in known.items() if name in args}
    return {**told, "pretrained_cfg": content.get("pretrained_cfg")}


def _count(tensors: Tensors, prefix: str) -> int:
    found = {int(match[1]) for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))}
    return max(found) + 1 if found else 0


def _settings(
    source: str,
    tensors: Tensors,
    geometry: Geometry,
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
        "pixel_norm": "kinetics" if source == "mae_st" else _pixel_norm(config),
        "positions": "flat" if "pos_embed" not in tensors and "pos_embed_spatial" not in tensors else "learned",
    }
    if fields["positions"] == "learned" and not geometry.flat_image:
        tables = [name for name in ("pos_embed", "decoder_pos_embed") if name in tensors]
        fields["positions"] = "joint" if tables else "learned"
    if "blocks.0.mlp.fc1.weight" in tensors:
        fields["mlp_ratio"] = tensors["blocks.0.mlp.fc1.weight"].shape[0] / width
    if "hidden_size" in config and "head.weight" in tensors:  # transformers
        fields["encoder_norm_eps"] = 1e-5
    if decoder_depth:
        decoder_width = tensors["decoder_pred.weight"].shape[1]
        habit = {640: 8}.get(decoder_width, max(1, decoder_width // 64))
        if source in ("mae", "mae_st", "hf-vitmae") and not slowfast:
            habit = 16
        fields |= {
            "decoder": "joint",
            "objective": "mae",
            "target": _target(source, config),
            "timestep": "none",
            "decoder_depth": decoder_depth,
            "decoder_width": decoder_width,
            "decoder_heads": decoder_heads or config.get("decoder_num_attention_heads") or habit,
            "decoder_class": "decoder_cls_token" in tensors,
            "decoder_class_position": _has_class_position(tensors, math.prod(geometry.shape)),
        }
        if source == "hf-videomae":
            fields["decoder_norm_eps"] = 1e-5
    return ModelSettings.model_validate(fields)


def _target(source: str, config: dict[str, Any]) -> str:
    """What such decoders predict: patches by their own statistics, VideoMAE's channel by channel."""
    if config.get("norm_pix_loss") is False:
        return "pixel"
    return "norm_pixel_channel" if source in ("videomae", "hf-videomae") else "norm_pixel"


def _has_class_position(tensors: Tensors, places: int) -> bool:
    """Whether the decoder gives the encoder's class token a place of its own (PySlowFast)."""
    if "decoder_cls_token" in tensors or "cls_token" not in tensors:
        return False
    table = tensors.get("decoder_pos_embed_class")
    if table is None and "decoder_pos_embed" in tensors:
        table = tensors["decoder_pos_embed"][:, : tensors["decoder_pos_embed"].shape[1] - places]
    return table is not None and bool(table.any())


def _pixel_norm(config: dict[str, Any]) -> str:
    """How pixels are scaled, by timm's config.json; ImageNet's way where nothing is said."""
    told = config.get("pretrained_cfg") or {}
    if "mean" not in told or "std" not in told:
        return "imagenet"
    given = [[round(float(value), 3) for value in told[key]] for key in ("mean", "std")]
    for name, pair in PIXEL_NORMS.items():
        if [[round(value, 3) for value in values] for values in pair] == given:
            return name
    raise DataError(
        f"Its pixels are scaled by mean {told['mean']} and deviation {told['std']}, which is none of "
        f"{', '.join(PIXEL_NORMS)}; give weights that were trained on one of these."
    )


def to_ours(tensors: Tensors, settings: ModelSettings) -> Tensors:
    """mae's names to ours; class positions are added to class tokens, which have no place here."""
    tensors = dict(tensors)
    out: Tensors = {}
    for prefix, ours in (("", "encoder."), ("decoder_", "decoder.")):
        place = _positions(tensors, prefix, settings)
        token = tensors.pop(f"{prefix}cls_token", None)
        at_class = place.pop("class", None)
        if token is not None:
            out[f"{ours}cls_token"] = token if at_class is None else token + at_class
        elif at_class is not None and prefix and settings.decoder_class_position:
            out["decoder.class_position"] = at_class
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


def _positions(tensors: Tensors, prefix: str, settings: ModelSettings) -> Tensors:
    """Take the position tables of encoder or decoder out of `tensors`, as ours: spatial and temporal, or joint."""
    kind, times = settings.positions, max(1, settings.frames // settings.tubelet)
    places = math.prod(side // settings.patch for side in settings.size)
    if f"{prefix}pos_embed_spatial" in tensors:
        spatial = tensors.pop(f"{prefix}pos_embed_spatial")  #   (1, S, D)
        temporal = tensors.pop(f"{prefix}pos_embed_temporal")  # (1, T/t, D)
        at_class = tensors.pop(f"{prefix}pos_embed_class", None)
        place: Tensors = {} if at_class is None else {"class": at_class}
        if kind == "joint":
            return place | {"joint": (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)}
        return place | {"spatial": spatial, "temporal": temporal}
    table = tensors.pop(f"{prefix}pos_embed", None)
    if table is None:
        return {}
    classes = table.shape[1] - (times * places if kind == "joint" else places)
    place = {"class": table[:, :1]} if classes else {}
    if kind == "joint":
        return place | {"joint": table[:, classes:]}
    return place | {"spatial": table[:, classes:], "temporal": torch.zeros(1, times, table.shape[2])}


def build(settings: ModelSettings, converted: Tensors, pool: str = "mean") -> DiffMAE | Classifier:
    """The model, with initial weights, that holds such tensors; `pool` is that of a classifier."""
    if any(name.startswith("decoder.") for name in converted):
        return DiffMAE(settings)
    classes = converted["head.weight"].shape[0] if "head.weight" in converted else 0
    return Classifier(Encoder(settings), classes, pool=pool)


def load_pretrained(path: Path | str, source: str = "auto", **options: Any) -> DiffMAE | Classifier:
    """Any weights: our own folder (`model.json` is in it), or another project's file through `import_weights`."""
    return load_model(path) if _is_own(path) else import_weights(source, path, **options)


def pretrained_file(path: Path | str) -> Path:
    """The file of weights that `load_pretrained` reads.

    Raises:
        UsageError: there is none.
    """
    path = Path(path)
    if _is_own(path):
        return (path if path.is_dir() else path.parent) / WEIGHTS
    return tensor_file(path)


def _is_own(path: Path | str) -> bool:
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return (folder / DESCRIPTION).is_file() and (path.is_dir() or path.name == WEIGHTS)

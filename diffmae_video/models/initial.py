"""First weights of a pre-training from other weights: the encoder, and the decoder where it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from diffmae_video.config import ModelSettings
from diffmae_video.errors import UsageError
from diffmae_video.files import sha256_of
from diffmae_video.models.classifier import Classifier
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.geometry import inflate_kernel
from diffmae_video.models.importers import load_pretrained, pretrained_file
from diffmae_video.models.layers import Positions, resize_spatial, resize_temporal
from diffmae_video.models.presets import resolve
from diffmae_video.models.tensors import Tensors

_ALIKE = ("mlp_ratio", "patch", "class_token", "qkv_bias", "layer_norm_eps", "positions", "pixel_norm")
"""Fields of `model`, beside its sizes, without which the same weights are another encoder."""


def start_from(model: DiffMAE, path: Path | str, name: str | None = None) -> str:
    """Replace a new model's weights by those of a file or folder, as far as they are of the same parts.

    The encoder is taken whole: positions are resized to the model's grid, and the patch embedding of an image model is
    inflated (the last frame of a tubelet sees). A decoder is taken whole where it answers the same question (objective
    and target) and has the same tensors; else it keeps its new weights.

    Args:
        model: with its first weights.
        path: a run, export or import of ours, or another project's weights, see `importers.load_pretrained`.
        name: what messages call it; the path by default.

    Returns:
        One line: what was taken, and what starts anew.

    Raises:
        UsageError: the encoders differ; the message says in which settings.
        DataError: the file cannot be read.
    """
    source, name = load_pretrained(path), name or str(path)
    inflated = source.settings.tubelet == 1 and source.settings.frames == 1 and model.tubelet > 1
    _check_encoder(source.settings, model.settings, inflated, name)
    given, own = source.state_dict(), model.state_dict()
    if inflated:
        key = "encoder.patch_embed.proj.weight"
        given[key] = inflate_kernel(given[key], model.tubelet)
        for key in ("decoder.head.weight", "decoder.head.bias"):
            if key in given:  # of single frames: each of the tubelet's starts as a copy
                given[key] = given[key].repeat(model.tubelet, *[1] * (given[key].dim() - 1))
    shape = model.encoder.shape
    for prefix in ("encoder", "decoder"):
        positions = getattr(getattr(source, prefix, None), "positions", None)
        if positions is not None:
            given |= {f"{prefix}.positions.{part}": table for part, table in _resized(positions, shape).items()}
    encoder = _part(own, "encoder.")
    taken = {key: given[key] for key in encoder}
    left = _why_not(model, source, given, own)
    decoder = (
        [] if left else [*_part(own, "decoder."), *_part(own, "space.")]
    )  # statistics go with what predicts in them
    taken |= {key: given[key] for key in decoder}
    model.load_state_dict(taken, strict=False)
    old = source.encoder.shape
    notes = [f"grid {_by(old)} resized to {_by(shape)}"] if old != shape else []
    notes += ["image kernels inflated"] if inflated else []
    shown = f" ({', '.join(notes)})" if notes else ""
    told = f"{len(encoder)} tensors of the encoder{shown}"
    told += f" and {len(decoder)} of the decoder" if decoder else ""
    fresh = len(own) - len(taken)
    return f"Weights: {told} from {name}; {fresh} tensors start anew{f' ({left})' if left else ''}."


def initial_sha256(path: Path | str) -> str:
    """SHA-256 of the weights that `start_from` reads."""
    return sha256_of(pretrained_file(path))


def _check_encoder(theirs: ModelSettings, ours: ModelSettings, inflated: bool, name: str) -> None:
    wanted: dict[str, tuple[Any, Any]] = {
        key: (old, new)
        for key, old, new in zip(("width", "depth", "heads"), resolve(theirs), resolve(ours), strict=True)
    }
    wanted |= {key: (getattr(theirs, key), getattr(ours, key)) for key in _ALIKE}
    if not inflated:
        wanted["tubelet"] = (theirs.tubelet, ours.tubelet)
    if theirs.positions == ours.positions == "sincos":
        wanted["position_period"] = (theirs.position_period, ours.position_period)
    differ = {key: pair for key, pair in wanted.items() if pair[0] != pair[1]}
    if differ:
        told = ", ".join(f"{key} {_text(old)} (model.{key} = {_text(new)} here)" for key, (old, new) in differ.items())
        settings = " ".join(f"--set model.{key}={_text(old)}" for key, (old, _) in differ.items())
        raise UsageError(f"--init {name} has an encoder of {told}; give other weights, or {settings}.")


def _why_not(model: DiffMAE, source: DiffMAE | Classifier, given: Tensors, own: Tensors) -> str:
    """Why a decoder starts anew; empty where it is taken."""
    if not isinstance(source, DiffMAE):
        return "there is no decoder in it"
    for key in ("objective", "target", "space"):
        old, new = getattr(source.settings, key), getattr(model.settings, key)
        if old != new:
            return f"its decoder has {key} {old}, not {new}"
    ours, theirs = (
        {key: tuple(part[key].shape) for key in [*_part(part, "decoder."), *_part(part, "space.")]}
        for part in (own, given)
    )
    if theirs != ours:
        return "its decoder has other tensors"
    return ""


def _part(tensors: dict[str, Tensor], prefix: str) -> list[str]:
    return [key for key in tensors if key.startswith(prefix)]


def _resized(positions: Positions, shape: tuple[int, int, int]) -> Tensors:
    """Learned tables for the grid `shape`; fixed ones are computed, not saved."""
    if positions.kind == "learned":
        spatial = resize_spatial(positions.spatial, positions.shape[1:], shape[1:])  # (1, S, D)
        return {"spatial": spatial, "temporal": resize_temporal(positions.temporal, shape[0]).contiguous()}
    return {"joint": positions(shape)} if positions.kind == "joint" else {}


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

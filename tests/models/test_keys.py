"""Importers against lists of the names and shapes of peers' checkpoints, tensor by tensor.

A list stands for the checkpoint: every tensor of it is filled with a number of its own, so that what arrives under our
names tells where it came from.
"""

from __future__ import annotations

import os
import re
from ast import literal_eval
from pathlib import Path

import pytest
import torch

from diffmae_video.config import ModelSettings
from diffmae_video.models.dialects import detect_source
from diffmae_video.models.importers import build, translate
from diffmae_video.models.tensors import tensor_problems

DATA = Path(os.environ.get("DIFFMAE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = sorted((DATA.parent / "keys").glob("*.txt"))
SOURCES = {"maest": "mae_st", "maestft": "mae_st", "mae": "mae", "timm": "timm", "hf_vitmae": "hf-vitmae"}
SOURCES |= {"videomae_pt": "videomae", "videomae_ft": "videomae"}
SOURCES |= {"hf_videomae_pt": "hf-videomae", "hf_videomae_ft": "hf-videomae"}

ABSENT = {  # a pre-training model of `use_mean_pooling = True` has no last norm, ours does: reported, as it must be
    "hf_videomae_pt__base": ["missing encoder.norm.weight (768,)", "missing encoder.norm.bias (768,)"]
}

PARTS = {  # of a block: our name, and what peers call it; queries, keys and values one after the other
    "norm1": ["norm1", "layernorm_before"],
    "norm2": ["norm2", "layernorm_after"],
    "attn.proj": ["attn.proj", "attention.output.dense"],
    "mlp.fc1": ["mlp.fc1", "intermediate.dense"],
    "mlp.fc2": ["mlp.fc2", "output.dense"],
    "attn.qkv": [
        "attn.qkv",
        "attn.q attn.k attn.v",
        "attention.attention.query attention.attention.key attention.attention.value",
    ],
}
BLOCKS = {  # where peers keep the blocks of encoder and decoder
    "encoder.blocks": ["blocks", "encoder.blocks", "vit.encoder.layer", "videomae.encoder.layer"],
    "decoder.blocks": ["decoder_blocks", "decoder.blocks", "decoder.decoder_layers"],
}
REST = {
    "encoder.patch_embed.proj": [
        "patch_embed.proj",
        "encoder.patch_embed.proj",
        "vit.embeddings.patch_embeddings.projection",
        "videomae.embeddings.patch_embeddings.projection",
    ],
    "encoder.norm": ["norm", "encoder.norm", "fc_norm", "vit.layernorm", "videomae.layernorm"],
    "head": ["head", "classifier"],
    "decoder.norm": ["decoder_norm", "decoder.norm", "decoder.decoder_norm"],
    "decoder.head": ["decoder_pred", "decoder.head", "decoder.decoder_pred"],
    "decoder.latent_embed": ["decoder_embed", "encoder_to_decoder", "decoder.decoder_embed"],
}
EXACT = {  # names without weight or bias
    "encoder.cls_token": ["cls_token", "vit.embeddings.cls_token"],
    "decoder.cls_token": ["decoder_cls_token"],
    "decoder.mask_token": ["mask_token", "decoder.mask_token"],
    "encoder.positions.spatial": ["pos_embed_spatial", "pos_embed", "vit.embeddings.position_embeddings"],
    "encoder.positions.temporal": ["pos_embed_temporal"],
    "decoder.positions.spatial": ["decoder_pos_embed_spatial", "decoder_pos_embed", "decoder.decoder_pos_embed"],
    "decoder.positions.temporal": ["decoder_pos_embed_temporal"],
}


def possible_origins(name: str) -> list[list[str]]:
    """Names that peers may have for one of our tensors; a list each, as queries, keys and values may be apart."""
    if name in EXACT:
        return [[peer] for peer in EXACT[name]]
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"(encoder\.blocks|decoder\.blocks)\.(\d+)\.(.+)", stem)
    if match is None:
        return [[f"{peer}.{kind}"] for peer in REST[stem]]
    blocks, number, part = match.groups()
    origins = [
        [f"{place}.{number}.{piece}.{kind}" for piece in peer.split()]
        for place in BLOCKS[blocks]
        for peer in PARTS[part]
    ]
    if (part, kind) == ("attn.qkv", "bias"):  # VideoMAE learns no key bias: zeros
        apart = [f"{place}.{number}.{attn}" for place in BLOCKS[blocks] for attn in ("attn", "attention.attention")]
        origins += [[f"{prefix}.q_bias", "", f"{prefix}.v_bias"] for prefix in apart]
    return origins


def read_list(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    lines = [line.split(" ", 1) for line in file.read_text().splitlines() if line.strip()]
    return {name: literal_eval(shape) for name, shape in lines}


def numbered(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Tensors of a list, the n-th full of n (held in no memory), and the names by number; 0 is for zeros."""
    names = dict(enumerate(shapes, 1))
    tensors = {name: torch.full((), n, dtype=torch.int16).expand(shapes[name]) for n, name in names.items()}
    table = tensors.get("decoder_pos_embed", tensors.get("decoder.decoder_pos_embed"))
    if table is not None:  # a sine-cosine table, zero at the class token
        for name in {"decoder_pos_embed", "decoder.decoder_pos_embed"} & tensors.keys():
            tensors[name] = torch.cat([torch.zeros_like(table[:, :1]), table[:, 1:]], 1)
    return tensors, names


def videomae_list(
    width: int, depth: int, inner: int, inner_depth: int, patch: int = 16, ratio: float = 4.0
) -> dict[str, tuple[int, ...]]:
    """A pre-training of VideoMAE, or of VideoMAEv2, which has the same names: queries and values have biases."""

    def blocks(prefix: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
        hidden, shapes = int(width * ratio), {}
        for number in range(depth):
            block = f"{prefix}.blocks.{number}."
            shapes |= {f"{block}norm1.{kind}": (width,) for kind in ("weight", "bias")}
            shapes |= {f"{block}attn.q_bias": (width,), f"{block}attn.v_bias": (width,)}
            shapes |= {f"{block}attn.qkv.weight": (3 * width, width)}
            shapes |= {f"{block}attn.proj.weight": (width, width), f"{block}attn.proj.bias": (width,)}
            shapes |= {f"{block}norm2.{kind}": (width,) for kind in ("weight", "bias")}
            shapes |= {f"{block}mlp.fc1.weight": (hidden, width), f"{block}mlp.fc1.bias": (hidden,)}
            shapes |= {f"{block}mlp.fc2.weight": (width, hidden), f"{block}mlp.fc2.bias": (width,)}
        return shapes | {f"{prefix}.norm.{kind}": (width,) for kind in ("weight", "bias")}

    values = 2 * patch * patch * 3
    shapes = {"mask_token": (1, 1, inner), "encoder_to_decoder.weight": (inner, width)}
    shapes |= {
        "encoder.patch_embed.proj.weight": (width, 3, 2, patch, patch),
        "encoder.patch_embed.proj.bias": (width,),
    }
    shapes |= blocks("encoder", width, depth) | blocks("decoder", inner, inner_depth)
    return shapes | {"decoder.head.weight": (values, inner), "decoder.head.bias": (values,)}


@pytest.mark.skipif(not FILES, reason="no lists of checkpoints here: ../shared/keys")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_tensor_of_a_checkpoint_arrives_at_its_place(file):
    shapes = read_list(file)
    if file.stem.startswith("videomae_pt"):  # the builder of VideoMAEv2's lists makes these too
        sizes = {"small": (384, 12, 192, 4), "base": (768, 12, 384, 4), "large": (1024, 24, 512, 12)}
        sizes |= {"huge": (1280, 32, 640, 12)}
        assert videomae_list(*sizes[file.stem.split("__")[1]]) == shapes
    check_arrivals(shapes, SOURCES[file.stem.split("__")[0]], ABSENT.get(file.stem, []))


@pytest.mark.parametrize(
    ("size", "decoder_heads", "shape"),
    [((1280, 32, 512, 4), 8, (8, 14, 14)), ((1408, 40, 512, 4, 14, 48 / 11), 8, (8, 16, 16))],
    ids=["huge", "giant"],
)
def test_videomae_v2(size, decoder_heads, shape):
    """Its decoders are 512 wide at any size; the giant has patches of 14 pixels and MLPs of 48 / 11."""
    settings = check_arrivals(videomae_list(*size), "videomae", [])
    assert (settings.width, settings.depth, settings.heads) == (*size[:2], 16)
    assert (settings.decoder_heads, settings.decoder_depth) == (decoder_heads, 4)
    assert (settings.frames // settings.tubelet, *(side // settings.patch for side in settings.size)) == shape


def check_arrivals(shapes: dict[str, tuple[int, ...]], source: str, absent: list[str]) -> ModelSettings:
    """Translate a list and follow every tensor of it; returns the settings it asks for."""
    tensors, names = numbered(shapes)
    assert detect_source(tensors) in (source, *(["timm"] if source == "mae" else []))
    settings, ours = translate(tensors, source)
    with torch.device("meta"):
        model = build(settings, ours)
    assert tensor_problems(model, ours) == absent  # nothing missing, unexpected or misshapen
    unread = set(names.values())
    for name, tensor in ours.items():
        column = tensor.reshape(len(tensor), -1)[:, 0]
        assert bool((tensor.reshape(len(tensor), -1) == column[:, None]).all()) or tensor.dim() == 3
        numbers = tensor[0, :, 0].unique_consecutive() if tensor.dim() == 3 else column.unique_consecutive()
        found = [names.get(int(number), "") for number in numbers]
        if name.endswith(".cls_token"):  # token plus its position: the sum of two numbers
            table = "decoder_" if name.startswith("decoder") else ""
            pair = [*(peer for (peer,) in possible_origins(name) if peer in tensors)]
            positions = (f"{table}pos_embed_class", f"{table}pos_embed", "vit.embeddings.position_embeddings")
            pair += [peer for peer in positions if peer in tensors]
            assert numbers.tolist() == [sum(int(tensors[peer].flatten()[0]) for peer in pair)]
            unread -= set(pair)
            continue
        if found == [""]:  # tables and a bias that the source does not have
            assert name in ("encoder.positions.temporal", "decoder.positions.temporal", "decoder.latent_embed.bias")
            assert not [peer for (peer,) in possible_origins(name) if peer in tensors]
            continue
        assert found in possible_origins(name), name
        unread -= set(found)
    assert unread == set()
    return settings

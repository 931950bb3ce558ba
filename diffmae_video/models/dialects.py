"""Names that other projects give to the tensors of a ViT: which project it is, and mae's names for all of them.

Known: facebookresearch/mae and mae_st (split or fused qkv, joint or separate positions, PySlowFast containers),
VideoMAE and VideoMAEv2, timm ViTs, Hugging Face ViTMAE and VideoMAE (key names of transformers 4 and 5). Each dialect
is renamed to the names of mae (`blocks.0.attn.qkv.weight`, `decoder_blocks.0...`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from diffmae_video.errors import DataError
from diffmae_video.models.tensors import Tensors

SOURCES = ("auto", "mae", "mae_st", "videomae", "timm", "hf-vitmae", "hf-videomae")

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|model\.|backbone\.)+")
"""What DDP, torch.compile and training code put before names, in any order."""

RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (WRAPPERS.pattern, ""),
    (r"^(vit|videomae)\.", ""),
    (r"^dec_pos_embed(_spatial|_temporal|_class)?$", r"decoder_pos_embed\1"),  # PySlowFast
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
    bare = {WRAPPERS.sub("", name): tensor.dim() for name, tensor in tensors.items()}
    if any(name.startswith(("vit.embeddings", "decoder.decoder_pos_embed")) for name in bare):
        return "hf-vitmae"
    if any(name.startswith("videomae.") for name in bare):
        return "hf-videomae"
    if "encoder.patch_embed.proj.weight" in bare:
        return "videomae"
    if "patch_embed.proj.weight" not in bare:
        raise DataError("These tensors are of no known project (no patch embedding is among them); name a ViT's file.")
    if any(name.startswith(("wfm.", "decoder_blocks.0.cross_attn", "dec_norms.")) for name in bare):
        raise DataError(
            "These tensors are CrossMAE's, whose decoder mixes all encoder outputs by learned weights, which ours does "
            "not do: import its encoder alone (a file without the decoder_, dec_norms and wfm tensors)."
        )
    if bare["patch_embed.proj.weight"] == 5:
        if any("_bias" in name and name.endswith(("attn.q_bias", "attn.v_bias")) for name in bare):
            return "videomae"  # fine-tuned, with learned positions or without
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

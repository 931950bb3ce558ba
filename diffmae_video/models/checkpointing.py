"""Activation checkpointing: blocks, or what is cheap in them, are computed again in the backward pass."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def run_block(block: nn.Module, mode: Checkpointing, *inputs: Tensor | None) -> Tensor:
    """block(*inputs); in training under checkpointing its activations are not kept.

    Args:
        block: any module whose inputs are tensors.
        mode: False keeps all, True keeps the inputs alone, `selective` also what attention and matrix products gave,
            unless an MLP narrows: its output is added to x, and no gradient reads it.
        inputs: of the block.
    """
    if not mode or not block.training:
        return block(*inputs)
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, use_reentrant=False, **options)


def _policy(context: Any, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    if operator in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operator in _PRODUCTS:
        rows, columns = inputs[-2:]  # (.., I) and (I, O), behind a bias where there is one
        return CheckpointPolicy.MUST_SAVE if rows.shape[-1] <= columns.shape[-1] else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.PREFER_RECOMPUTE

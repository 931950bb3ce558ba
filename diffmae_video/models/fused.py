"""Linear layers that keep little for the backward pass: on CPUs under autocast, what is cheap is computed again.

Autocast keeps for every linear layer its input and its weight in bf16, for a LayerNorm before it the float32 input, for
a GELU its input. Here a layer keeps one bf16 tensor, from which the norm or the GELU before it is computed again, and
casts its weight again (beside two matrix products that read it). A step then holds half as much between its passes, for
2 to 5% of its time.

Letters: B batch, L tokens, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear` that may be told what stands before it, a LayerNorm or a GELU."""

    def forward(self, x: Tensor, before: nn.LayerNorm | nn.GELU | None = None) -> Tensor:
        """linear(before(x)): x (B, L, I) -> (B, L, O)."""
        if not _recomputes(x, self.weight):
            return super().forward(x if before is None else before(x))
        if isinstance(before, nn.LayerNorm):
            return _NormLinear.apply(x, before.weight, before.bias, before.eps, self.weight, self.bias)
        return _GeluLinear.apply(x, before is not None, self.weight, self.bias)


class Mlp(nn.Module):
    """Two layers and a GELU, with timm's parameter names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """x (B, L, D), normed first -> (B, L, D)."""
        return self.fc2(self.fc1(x, norm), self.act)


def _recomputes(x: Tensor, weight: Tensor) -> bool:
    """Compilers choose for themselves what to keep, and on GPUs a second cast or norm is not as cheap."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.compiler.is_compiling()
    )


class _NormLinear(torch.autograd.Function):
    """linear(layer_norm(x)) as autocast computes it; the backward pass starts from x in autocast's type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        ctx.eps, ctx.dtype = eps, x.dtype
        ctx.save_for_backward(x.to(dtype), scale, shift, weight)
        y = F.layer_norm(x, x.shape[-1:], scale, shift, eps)
        return _linear(y.to(dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        y, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)
        d_weight, d_bias = _parameters_backward(grad, y, weight, needs[5])
        dy = _input_backward(grad, weight, y).float()  # in bf16 the kernel would add up rows in bf16, 6% off over 2816
        dx, d_scale, d_shift = torch.ops.aten.native_layer_norm_backward(
            dy, x.float(), x.shape[-1:], mean, deviation, scale, shift, needs[:3]
        )
        return None if dx is None else dx.to(ctx.dtype), d_scale, d_shift, None, d_weight, d_bias


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)), or linear(x), as autocast computes it; the backward pass starts from x in autocast's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.gelu, ctx.dtype = gelu, x.dtype
        dtype = torch.get_autocast_dtype("cpu")
        ctx.save_for_backward(x.to(dtype), weight)
        return _linear((F.gelu(x) if gelu else x).to(dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, _, needs_bias = ctx.needs_input_grad
        y = F.gelu(x) if ctx.gelu else x
        d_weight, d_bias = _parameters_backward(grad, y, weight, needs_bias)
        dx = None
        if needs_x:
            dx = _input_backward(grad, weight, y if ctx.gelu else torch.empty_like(x))
            if ctx.gelu:
                torch.ops.aten.gelu_backward(dx, x, grad_input=dx)
            dx = dx.to(ctx.dtype)
        return dx, None, d_weight, d_bias


def _linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))


def _parameters_backward(grad: Tensor, y: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight (O, I) and bias (O,) of a layer, given the one of its output."""
    rows = grad.flatten(0, -2)  #                       (B * L, O)
    d_weight = rows.mT @ y.flatten(0, -2)
    return d_weight.to(weight.dtype), rows.sum(0).to(weight.dtype) if bias else None


def _input_backward(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Gradient (B, L, I) of a layer's input, written over `out`, whose values nobody needs any more."""
    torch.mm(grad.flatten(0, -2), weight.to(grad.dtype), out=out.view(-1, out.shape[-1]))
    return out

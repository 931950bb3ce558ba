"""Linear layers that compute a norm or a GELU again, against autocast of PyTorch's modules and float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffmae_video.config import ModelSettings
from diffmae_video.masking import make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.fused import Linear, Mlp

BEFORE = {"nothing": None, "norm": nn.LayerNorm(24, eps=1e-6), "gelu": nn.GELU()}


def layers(before: str, bias: bool = True) -> tuple[nn.Module | None, Linear]:
    """A norm, a GELU or nothing, and a layer after it, with random parameters."""
    torch.manual_seed(0)
    first, layer = copy.deepcopy(BEFORE[before]), Linear(24, 40, bias=bias)
    with torch.no_grad():
        for parameter in () if first is None else first.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return first, layer


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens away from zero mean and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 50, 24, generator=generator) * 2 + 0.5
    return x.to(dtype).requires_grad_(), torch.randn(3, 50, 40, generator=generator).bfloat16()


def plain(first: nn.Module | None, layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's functions."""
    return F.linear(x if first is None else first(x), layer.weight, layer.bias)


def run(function, first, layer, x, grad) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients of input and parameters, under autocast."""
    wanted = [x, *layer.parameters(), *(() if first is None else first.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        out = function(first, layer, x)
    return out, list(torch.autograd.grad(out, wanted, grad))


def ours(first: nn.Module | None, layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer under test."""
    return layer(x, first)


@pytest.mark.parametrize(("before", "bias"), [("nothing", True), ("norm", True), ("norm", False), ("gelu", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_equals_modules_and_gradients_are_as_close_to_the_truth(before, bias, dtype):
    first, layer = layers(before, bias)
    x, grad = inputs(dtype)
    out, gradients = run(ours, first, layer, x, grad)
    expected, expected_gradients = run(plain, first, layer, x, grad)
    assert torch.equal(out, expected)
    if dtype == torch.bfloat16:  # there PyTorch adds up a norm's gradients in bf16
        expected_gradients = run(plain, first, layer, x.detach().float().requires_grad_(), grad)[1]
    exact = [None if first is None else copy.deepcopy(first).double(), copy.deepcopy(layer).double()]
    x64 = x.detach().double().requires_grad_()
    wanted = [x64, *exact[1].parameters(), *(() if first is None else exact[0].parameters())]
    truths = torch.autograd.grad(plain(*exact, x64), wanted, grad.double())
    for mine, theirs, true in zip(gradients, expected_gradients, truths, strict=True):
        assert mine.shape == theirs.shape
        errors = [float((value.double() - true).norm() / true.norm()) for value in (mine, theirs)]
        assert errors[0] < max(1.3 * errors[1], 0.004)
        assert errors[1] < 0.01


@pytest.mark.parametrize("before", BEFORE)
def test_a_layer_keeps_one_narrow_tensor(before):
    first, layer = layers(before)
    x, _ = inputs(torch.float32)
    parameters = {p.data_ptr() for module in (first, layer) if module is not None for p in module.parameters()}
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x, first)
    kept = [tensor for tensor in kept if tensor.data_ptr() not in parameters]
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bfloat16, x.shape)]


@pytest.mark.parametrize("frozen", ["x", "norm", "bias", "weight", "x and norm"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen):
    first, layer = layers("norm")
    x, grad = inputs(torch.float32)
    tensors = {"x": [x], "norm": [*first.parameters()], "bias": [layer.bias], "weight": [layer.weight]}
    expected = dict(zip(["x", "weight", "bias", "scale", "shift"], run(ours, first, layer, x, grad)[1], strict=True))
    for name in frozen.split(" and "):
        for tensor in tensors[name]:
            tensor.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, first).backward(grad)
    named = {"x": x, "weight": layer.weight, "bias": layer.bias, "scale": first.weight, "shift": first.bias}
    for name, tensor in named.items():
        if not tensor.requires_grad:
            assert tensor.grad is None
        else:  # equal, but for a frozen weight, where PyTorch's way is taken
            assert (tensor.grad - expected[name]).norm() <= (0.01 * expected[name].norm() if frozen == "weight" else 0)


def test_without_autocast_it_is_the_modules():
    mlp, norm = Mlp(24, 48).double(), copy.deepcopy(BEFORE["norm"]).double()
    x, _ = inputs(torch.float64)
    expected = mlp.fc2(F.gelu(mlp.fc1(norm(x))))
    assert torch.equal(mlp(x, norm), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inference = mlp.float()(x.float(), norm.float())
    with torch.autocast("cpu", torch.bfloat16):
        training = mlp(x.float(), norm)
    assert torch.equal(inference, training)


def test_a_model_under_checkpointing_and_accumulation_learns_the_same():
    settings = ModelSettings(
        preset="nano", width=32, depth=2, heads=2, frames=4, size=(32, 32), patch=8, decoder_width=32, decoder_heads=2
    )
    model = DiffMAE(settings).train()
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = make_mask("random", 0.75, model.encoder.shape, [0, 1])
    results = []
    for checkpointing, times in itertools.product((False, True), (1, 2)):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        for _ in range(times):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(clips, mask, model.draw([1, 2], mask)).loss
            (loss / times).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

"""Attention in blocks against SDPA, what it holds in memory, and a model that it is swapped into."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffmae_video.config import ModelSettings
from diffmae_video.masking import Mask, make_mask
from diffmae_video.models.diffmae import DiffMAE
from diffmae_video.models.kernels import attention, use_cpu_bf16
from diffmae_video.models.kernels.attention import blocked_attention

SHAPES = [(2, 3, 37, 37, 8), (1, 2, 64, 9, 4), (3, 1, 5, 70, 16)]  # B, H, L, K, d
SHAPE_NAMES = ["self", "cross, few keys", "cross, few queries"]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values with gradients, and a gradient of the output."""
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    tensors = [torch.randn(batch, n, heads, width, generator=generator, dtype=torch.float64) * 2 for n in lengths]
    return [tensor.to(dtype).requires_grad_(n < 3) for n, tensor in enumerate(tensors)]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's operator."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same with all scores at once, rounded to the inputs' type."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2)


def gradients(function, q, k, v, grad) -> list[torch.Tensor]:
    """Output and gradients of a function of q, k, v."""
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("block", [7, 200, 2**19])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_blocks_equal_sdpa_in_float64(shape, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    inputs = random_inputs(shape, torch.float64)
    for ours, theirs in zip(gradients(blocked_attention, *inputs), gradients(sdpa, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("shape", [(1, 2, 300, 300, 64), (1, 2, 300, 40, 32)])
def test_bf16_is_as_close_to_the_truth_as_unfused_attention(shape, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 10_000)
    inputs = random_inputs(shape, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    ours = gradients(blocked_attention, *inputs)
    for mine, plain, true in zip(ours, gradients(unfused, *inputs), gradients(sdpa, *exact), strict=True):
        errors = [float((x.double() - true).norm() / true.norm()) for x in (mine, plain)]
        assert errors[0] < 1.3 * errors[1] < 0.03


@pytest.mark.parametrize("shape", [(2, 2, 0, 0, 8), (2, 2, 5, 0, 8), (2, 2, 0, 5, 8), (0, 2, 5, 5, 8)])
def test_nothing_to_attend_to_gives_zeros(shape):
    """All patches hidden, none hidden, an empty batch: as in PyTorch's operator."""
    inputs = random_inputs(shape, torch.float64)
    for ours, theirs in zip(gradients(blocked_attention, *inputs), gradients(sdpa, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_operators_are_registered_in_full():
    q, k, v, grad = random_inputs(SHAPES[0], torch.float64)
    torch.library.opcheck(blocked_attention, (q, k, v))
    plain = tuple(x.detach() for x in (grad, q, k, v))
    torch.library.opcheck(attention.blocked_attention_backward, plain)


class Largest(TorchDispatchMode):
    """Notes the largest result of any operator that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, look at its results."""
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_matrix_of_all_scores(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2**12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v, grad = (x.detach() for x in random_inputs((1, 1, 512, 512, 4), torch.bfloat16))
    with Largest() as seen:
        assert torch.ones(3, 5).numel() == seen.numel == 15  # it does see
        blocked_attention._init_fn(q, k, v)  # below the operator, where its parts can be seen
        attention.blocked_attention_backward._init_fn(grad, q, k, v)
    assert 2**12 <= seen.numel <= 2**13  # of 2^18 scores


def run(net: DiffMAE, mask: Mask, precision: torch.dtype) -> list[torch.Tensor]:
    """Loss and gradients of a training step."""
    net.zero_grad()
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = net(clips, mask, net.draw([1, 2], mask)).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


def model(**changes) -> DiffMAE:
    """A small model."""
    fields = {"preset": "nano", "width": 32, "depth": 2, "heads": 2, "frames": 4, "size": (32, 32), "patch": 8}
    return DiffMAE(ModelSettings(**fields | {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1} | changes))


@pytest.mark.parametrize("decoder", ["joint", "cross_self", "cross"])
def test_a_model_with_it_learns_the_same_and_keeps_its_names(decoder, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "blocked_attention", lambda *qkv: calls.append(len(qkv)) or blocked_attention(*qkv))
    net, mask = model(decoder=decoder), make_mask("random", 0.75, (2, 4, 4), [0, 1])
    names, plain, exact = list(net.state_dict()), run(net, mask, torch.bfloat16), run(net, mask, torch.float32)
    use_cpu_bf16(net)
    assert list(net.state_dict()) == names
    assert not calls
    swapped = run(net, mask, torch.bfloat16)
    assert len(calls) == (4 if decoder == "cross_self" else 3)  # every attention of two blocks and one
    for ours, theirs, true in zip(swapped, plain, exact, strict=True):
        errors = [float((value - true).norm()) for value in (ours, theirs)]
        assert errors[0] < 1.5 * errors[1] + 1e-3 * float(true.norm()) + 1e-6
    again = run(net, mask, torch.float32)  # other types go the way they went
    assert all(torch.equal(one, two) for one, two in zip(again, exact, strict=True))


def test_masked_keys_go_the_way_they_went():
    grid = torch.zeros(2, 32, dtype=torch.bool)
    grid[0, 3:20], grid[1, ::4] = True, True
    net, mask = model(), Mask.from_grid(grid, (2, 4, 4))
    plain = run(net, mask, torch.bfloat16)
    use_cpu_bf16(net)
    assert all(torch.equal(one, two) for one, two in zip(run(net, mask, torch.bfloat16), plain, strict=True))

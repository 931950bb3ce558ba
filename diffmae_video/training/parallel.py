"""How the model is spread over processes: DistributedDataParallel or FSDP2 (`fully_shard`), and torch.compile."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmae_video.config import TrainSettings
from diffmae_video.training.distributed import Distributed
from diffmae_video.training.hardware import swap_kernels


def parallelize(model: Any, train: TrainSettings, distributed: Distributed) -> nn.Module:
    """The module to call in training. `model` itself keeps its names and stays the one to save, sample and inspect.

    FSDP2 shards every block of the encoder and decoder (any child of a ModuleList) and then the rest, in place.
    """
    swap_kernels(model, distributed.device, train.precision)
    if train.grad_checkpointing:
        model.set_grad_checkpointing(train.grad_checkpointing)
    wrapped: nn.Module = model
    together = distributed.world > 1 or dist.is_initialized()  # a group may be of one
    if together and train.sharding == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(distributed.device.type, (distributed.world,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList):
                for block in module:
                    if any(True for _ in block.parameters()):
                        fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # about in-place operations on what the model returns; the loop makes none
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for name in ("encode", "denoise", "sample", "forward_features"):  # they read parameters outside forward
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
    elif together:
        places = [distributed.device] if distributed.device.type == "cuda" else None
        options = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        constant = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        buffers: dict[str, Any] = {constant: False}
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=places, gradient_as_bucket_view=True, **buffers)
    return torch.compile(wrapped) if train.compile else wrapped  # type: ignore[return-value]


def reshard(model: nn.Module) -> None:
    """Free FSDP2's gathered parameters, so that the model's names mean the shards again; nothing without FSDP2."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextlib.contextmanager
def synchronized(wrapped: nn.Module, last: bool) -> Any:
    """Exchange gradients in the last micro-batch of a step only."""
    module: Any = getattr(wrapped, "_orig_mod", wrapped)
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(last)
        yield
    elif not last and hasattr(module, "no_sync"):  # DDP
        with module.no_sync():
            yield
    else:
        yield


def gradient_norm(model: nn.Module, limit: float) -> Tensor:
    """Total norm of the gradients over all processes, clipped to `limit` where that is above 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def full_state(model: nn.Module, average: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Unsharded weights on the host, with the moving average in place of the parameters where there is one.

    A collective under FSDP.
    """
    state = {**model.state_dict(), **(average or {})}
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().to("cpu", copy=True)
        for name, tensor in state.items()
    }

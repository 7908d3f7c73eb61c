"""Frozen weights that the processes of one training share out among themselves, by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snella.layer import SnellaLayer
from snella_app.methods import spec_of
from snella_app.methods.model_parts import base_model, find_blocks
from snella_app.training.distributed import process_count

_GATHERED_BLOCKS = 2
"""Blocks whose weights are whole at one time: the one at work, and the one that is fetched meanwhile."""


def shard_frozen(model: nn.Module) -> None:
    """Leave each process a part of every frozen weight; what is trained stays whole in all of them.

    A block's weights are gathered for its forward pass and again for its backward pass, and let go after each; so are
    those outside of the blocks, for the model's passes. All processes have to make the same passes, and to call
    `average_gradients` after the last backward pass of a step.

    Args:
        model: From `build_method`, on its device, the same in all processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (process_count(),))
    in_order = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _broadcast([parameter.detach() for parameter in in_order])
    trained = set(in_order)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=trained)
        block.register_forward_hook(_drop_effective_weights)
    # let go after the forward pass too, or a process that reads the model's state would be the only one without them
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_frozen` was applied to a model."""
    if process_count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean of all processes' gradients, and the main one's statistics of normalizations."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for flat, parts in _flattened(gradients):
        dist.all_reduce(flat)
        flat /= process_count()
        for gradient, part in zip(parts, flat.split([gradient.numel() for gradient in parts]), strict=True):
            gradient.copy_(part.view_as(gradient))
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    _broadcast([buffer for layer in layers for buffer in layer.buffers()])


def saved_bytes(model: nn.Module, count: int) -> int:
    """Bytes that each of `count` processes saves by sharing out the frozen weights of a model that is still whole."""
    if count == 1:
        return 0
    blocks = [_frozen_bytes(block) for block in _blocks(model)]
    total = _frozen_bytes(model)
    outside = total - sum(blocks)
    gathered = outside + min(_GATHERED_BLOCKS * max(blocks, default=0), sum(blocks))
    return max(total - total // count - gathered, 0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the backbone, in forward order."""
    return [block for _, block in find_blocks(base_model(model), spec_of(model).head)]


def _drop_effective_weights(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook: let weights with their updates go, which in evaluation would be kept as whole as the model was."""
    if not module.training:
        for layer in module.modules():
            if isinstance(layer, SnellaLayer):
                layer.clear_cache()


def _frozen_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are not trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def _broadcast(tensors: list[Tensor]) -> None:
    """Give every process the main one's values."""
    for flat, parts in _flattened(tensors):
        dist.broadcast(flat, src=0)
        for tensor, part in zip(parts, flat.split([tensor.numel() for tensor in parts]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _flattened(tensors: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """The values of all tensors of a dtype in one row, with these tensors."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    return [(torch.cat([tensor.flatten() for tensor in parts]), parts) for parts in by_dtype.values()]

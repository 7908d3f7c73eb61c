"""Distributed training with `torchrun` or `accelerate launch`: ranks, collectives, batches, and FSDP2 sharding.

The processes split each batch. Each process holds the whole model, unless the frozen weights, i.e. those that are not
trained, are sharded.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Sampler

from snella.layer import SnellaLayer
from snella_app.methods import spec_of
from snella_app.methods.model_parts import base_model, find_blocks

_T = TypeVar("_T")
_GATHERED_BLOCKS = 2
"""Number of blocks whose weights are gathered at the same time: the running block and the prefetched one."""
_UNSUPPORTED_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Names of the Accelerate modes that are not supported, by the environment variable that enables them."""


def process_count() -> int:
    """Return the number of processes (the world size), which is 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_index() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the main process, which writes files and prints."""
    return process_index() == 0


def require_single_process(operation: str) -> None:
    """Reject distributed launches; `operation` is the subject of the message, e.g. "a comparison".

    Raises:
        NotImplementedError: If the world size is larger than 1.
    """
    if process_count() > 1:
        raise NotImplementedError(
            f"{operation} runs in one process, but torchrun or accelerate has set WORLD_SIZE={process_count()}; "
            "start it with `snella` or `python`, or unset WORLD_SIZE"
        )


def init_process_group(device: str) -> None:
    """If there are several processes, initialize the process group on the GPU of the local rank or on the CPU.

    Raises:
        NotImplementedError: If Accelerate is configured for one of `_UNSUPPORTED_MODES`.
        ValueError: If `device` names a single device for several processes.
    """
    for variable, name in _UNSUPPORTED_MODES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise NotImplementedError(
                f"accelerate is configured for {name} ({variable}={os.environ[variable]}), but distributed training "
                f"uses DDP with a full model per process; use torchrun, or accelerate launch without {name}; --shard "
                "shards the frozen weights with FSDP2"
            )
    if process_count() > 1:
        if ":" in device:
            raise ValueError(
                f"device must be auto, cpu or cuda for {process_count()} processes, got {device!r}; each process uses "
                "its own device"
            )
        from accelerate import PartialState  # slow import

        was_initialized = dist.is_initialized()
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        if not was_initialized:  # a group that is still alive can abort the process at exit
            atexit.register(state.destroy_process_group)


def wait_for_everyone() -> None:
    """Wait until all processes reach this point."""
    if process_count() > 1:
        dist.barrier()


def mean_across_processes(value: float) -> float:
    """Return the mean of a number over all processes; NaN if any value is NaN."""
    if process_count() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL accepts only tensors on GPUs
    return float(sum_across_processes(torch.tensor(value, dtype=torch.float64, device=device))) / process_count()


def sum_across_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_main(make: Callable[[], _T]) -> _T:
    """Run `make` in the main process and broadcast its result.

    Raises:
        Exception: In the main process, if `make` fails.
        SystemExit: In all other processes, if `make` fails. They exit without a message.
    """
    if process_count() == 1:
        return make()
    shared: list[Any] = [None, 0]  # result, and exit status or None
    error: Exception | None = None
    if is_main():
        try:
            shared = [make(), None]
        except Exception as caught:
            error = caught
            shared = [None, getattr(caught, "exit_status", 2)]
    dist.broadcast_object_list(shared, src=0)
    if error is not None:
        raise error
    result, exit_status = shared
    if exit_status is not None:
        raise SystemExit(exit_status)
    return result


@contextmanager
def main_process_only(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context only in the main process.

    The other processes only run the body. On an interrupt, or an error with an `exit_status`, they exit without a
    message.

    Raises:
        SystemExit: If a process other than the main one is interrupted, or fails with an `exit_status`.
    """
    if is_main():
        with context:
            yield
        return
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT, as shells report it
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        raise SystemExit(status) from None


class ShardedBatches(Sampler[list[int]]):
    """Batch sampler that splits each global batch into consecutive parts, one per process.

    A small last batch may leave a process without images. Since all processes must run the same passes, such a process
    receives the first image of the batch, with a loss weight of 0.

    Args:
        sampler: Sampler of the image indices of an epoch, identical in all processes.
        batch_size: Global batch size.
        rank: Rank of this process.
        count: Number of processes.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, count: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            shard_start = sum(_shard_size(len(batch), lower_rank, self.count) for lower_rank in range(self.rank))
            shard = batch[shard_start : shard_start + _shard_size(len(batch), self.rank, self.count)]
            yield shard or batch[:1]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def weight(self, number: int) -> int:
        """Return the number of images of batch `number` that belong to this process."""
        batch_size = min(self.batch_size, len(self.sampler) - number * self.batch_size)  # type: ignore[arg-type]
        return _shard_size(batch_size, self.rank, self.count)


def _shard_size(batch_size: int, rank: int, num_processes: int) -> int:
    """Return the number of images of a rank. If a batch cannot be split evenly, the lowest ranks get one more each."""
    return batch_size // num_processes + (rank < batch_size % num_processes)


def shard_frozen(model: nn.Module) -> None:
    """Shard the frozen weights of a model across processes, and broadcast the trainable ones, which stay replicated.

    A block's weights are gathered for its forward and its backward pass, and freed after each. Weights outside the
    blocks are gathered for the whole forward or backward pass of the model. All processes must run the same passes,
    and call `average_gradients` after the last backward pass of a step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (process_count(),))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _apply_flattened(_broadcast, [parameter.detach() for parameter in trained])
    ignored = set(trained)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
        block.register_forward_hook(_drop_effective_weights)
    # reshard after the forward pass in all processes; otherwise, reading the model's state in one process would reshard
    # the weights only there
    fully_shard(model, mesh=mesh, ignored_params=ignored, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_frozen` was applied to a model."""
    if process_count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def average_gradients(model: nn.Module) -> None:
    """Average gradients over all processes and broadcast the main process's batch norm statistics."""

    def average(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= process_count()

    _apply_flattened(average, [parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    _apply_flattened(_broadcast, [buffer for batch_norm in batch_norms for buffer in batch_norm.buffers()])


def sharding_savings(model: nn.Module, count: int) -> int:
    """Predict the bytes that each of `count` processes saves by sharding the frozen weights of an unsharded model.

    Each process keeps its shard, the gathered weights outside the blocks, and those of `_GATHERED_BLOCKS` blocks.
    """
    block_bytes = [_frozen_bytes(block) for block in _blocks(model)]
    total = _frozen_bytes(model)
    outside = total - sum(block_bytes)
    gathered = outside + min(_GATHERED_BLOCKS * max(block_bytes, default=0), sum(block_bytes))
    return max(total - total // count - gathered, 0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the backbone's repeated blocks in module order."""
    return [block for _, block in find_blocks(base_model(model), spec_of(model).head)]


def _drop_effective_weights(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Free the cached sums of weights and updates, which evaluation would otherwise keep unsharded (forward hook)."""
    if not module.training:
        for layer in module.modules():
            if isinstance(layer, SnellaLayer):
                layer.clear_cache()


def _frozen_bytes(module: nn.Module) -> int:
    """Return the size of a module's frozen parameters in bytes."""
    return sum(p.nbytes for p in module.parameters() if not p.requires_grad)


def _broadcast(flat: Tensor) -> None:
    """Broadcast a tensor from the main process, in place."""
    dist.broadcast(flat, src=0)


def _apply_flattened(operation: Callable[[Tensor], None], tensors: list[Tensor]) -> None:
    """Concatenate tensors into one vector per dtype, apply an in-place operation, and copy the results back."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same_dtype in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in same_dtype])
        operation(flat)
        sizes = [tensor.numel() for tensor in same_dtype]
        for tensor, values in zip(same_dtype, flat.split(sizes), strict=True):
            tensor.copy_(values.view_as(tensor))

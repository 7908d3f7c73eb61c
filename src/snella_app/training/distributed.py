"""Distributed training with `torchrun` or `accelerate launch`: ranks, collectives and sharded batches."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

_T = TypeVar("_T")


def process_count() -> int:
    """Return the number of processes (world size); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_index() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the main process, which writes files and prints."""
    return process_index() == 0


def require_single_process(operation: str) -> None:
    """Raise an error in distributed launches.

    Args:
        operation: Name of the operation for the message, such as "a comparison".

    Raises:
        NotImplementedError: If the world size is larger than 1.
    """
    if process_count() > 1:
        raise NotImplementedError(
            f"{operation} runs in one process, got WORLD_SIZE={process_count()} from torchrun or accelerate; "
            "start it with `snella` or `python`, or unset WORLD_SIZE"
        )


_UNSUPPORTED_MODES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Unsupported Accelerate modes by environment variable."""


def init_process_group(device: str) -> None:
    """Initialize the process group; no-op in a single process.

    Args:
        device: auto, cpu or cuda; each process uses the GPU of its local rank.

    Raises:
        NotImplementedError: If Accelerate is configured to shard the model.
        ValueError: If `device` names a single device for several processes.
    """
    for variable, name in _UNSUPPORTED_MODES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise NotImplementedError(
                f"distributed training uses DDP with a full model per process, got {name} ({variable}="
                f"{os.environ[variable]}); use torchrun, or accelerate launch without {name}; --shard shards the "
                "frozen weights with FSDP2"
            )
    if process_count() > 1:
        if ":" in device:
            raise ValueError(
                f"device must be auto, cpu or cuda for {process_count()} processes, got {device!r}; each process uses "
                "its own device"
            )
        from accelerate import PartialState  # slow import

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def wait_for_everyone() -> None:
    """Wait until all processes reach this point."""
    if process_count() > 1:
        dist.barrier()


def any_across_processes(flag: bool) -> bool:
    """Return True if the flag is set in any process."""
    if process_count() == 1:
        return flag
    value = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def mean_across_processes(value: float) -> float:
    """Return the mean of a number over all processes; NaN if any value is NaN."""
    if process_count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return float(total) / process_count()


def sum_across_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_main(make: Callable[[], _T]) -> _T:
    """Run `make` in the main process and broadcast its result.

    Raises:
        Exception: If `make` fails; raised only in the main process.
        SystemExit: If `make` fails; raised silently in all other processes.
    """
    if process_count() == 1:
        return make()
    shared: list[Any] = [None, 0]
    error: Exception | None = None
    if is_main():
        try:
            shared = [make(), None]
        except Exception as caught:
            error, shared = caught, [None, getattr(caught, "exit_status", 2)]
    dist.broadcast_object_list(shared, src=0)
    if error is not None:
        raise error
    if shared[1] is not None:
        raise SystemExit(shared[1])
    return shared[0]


@contextmanager
def main_process_only(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context only in the main process; errors end all other processes silently.

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
        raise SystemExit(130) from None
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        raise SystemExit(status) from None


def shard_size(images: int, rank: int, count: int) -> int:
    """Return the number of images of one rank when a batch is split as evenly as possible, larger parts first."""
    return images // count + (rank < images % count)


class ShardedBatches(Sampler[list[int]]):
    """Batch sampler that splits each global batch into consecutive parts, one per process.

    If a small last batch leaves a process without images, it receives the first image with weight 0.

    Args:
        sampler: Indices of all images, identical in all processes.
        batch_size: Global batch size.
        rank: Rank of this process.
        count: Number of processes.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, count: int) -> None:
        self.sampler, self.batch_size, self.rank, self.count = sampler, batch_size, rank, count

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            before = sum(shard_size(len(batch), rank, self.count) for rank in range(self.rank))
            yield batch[before : before + shard_size(len(batch), self.rank, self.count)] or batch[:1]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def weight(self, number: int) -> int:
        """Return the number of images of batch `number` that belong to this process."""
        images = min(self.batch_size, len(self.sampler) - number * self.batch_size)  # type: ignore[arg-type]
        return shard_size(images, self.rank, self.count)

"""Several processes of one training, as `torchrun` and `accelerate launch` start them: who writes, what is agreed."""

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
    """Processes of this training; 1 if nothing has started several."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_number() -> int:
    """Number of this process, its rank."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and talks; the others only compute."""
    return process_number() == 0


def refuse_several_processes(what: str) -> None:
    """Refuse to be one of several processes.

    Args:
        what: What is done here: "a comparison".

    Raises:
        NotImplementedError: This is one of several.
    """
    if process_count() > 1:
        raise NotImplementedError(
            f"{what} runs in one process, got WORLD_SIZE={process_count()} from torchrun or accelerate; start it with "
            "`snella` or `python` alone, or leave WORLD_SIZE unset"
        )


_OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""What else Accelerate can be asked for, by the variable that it sets."""


def join_processes(device: str) -> None:
    """Meet the other processes; nothing where there are none.

    Args:
        device: auto, cpu or cuda; on GPUs each process takes the one of its local rank.

    Raises:
        NotImplementedError: Accelerate was asked to shard the model.
        ValueError: One device for several processes.
    """
    for variable, name in _OTHER_WAYS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise NotImplementedError(
                f"several processes train by DDP, each with the whole model, got {name} ({variable}="
                f"{os.environ[variable]}); start them with torchrun, or accelerate launch without it; --shard shares "
                "the frozen weights out by FSDP2"
            )
    if process_count() > 1:
        if ":" in device:
            raise ValueError(
                f"device must be auto, cpu or cuda for {process_count()} processes, each of which takes its own, got "
                f"{device!r}"
            )
        from accelerate import PartialState  # takes a while to import

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def wait_for_others() -> None:
    """Wait until all processes have come here."""
    if process_count() > 1:
        dist.barrier()


def any_of_all(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if process_count() == 1:
        return flag
    value = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def mean_of_all(value: float) -> float:
    """The mean of a number over all processes; NaN if it is that in one of them."""
    if process_count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return float(total) / process_count()


def sum_of_all(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if process_count() > 1:
        dist.all_reduce(values)
    return values


def from_main(make: Callable[[], _T]) -> _T:
    """What the main process makes, in all processes.

    Raises:
        Exception: What `make` raises in the main process.
        SystemExit: The same in the others, which say nothing of it.
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
def only_main(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context in the main process alone; what all processes meet inside ends the others silently.

    Raises:
        SystemExit: Outside of the main process, in place of an interruption or an error with an `exit_status`.
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
    """Images of one process of a batch that is cut into parts as equal as possible, larger ones first."""
    return images // count + (rank < images % count)


class ShardedBatches(Sampler[list[int]]):
    """One process's part of each batch: batches are those of a single process, cut into consecutive parts.

    A process for which nothing is left of a small last batch gets its first image, to be weighted with 0.

    Args:
        sampler: Indices of all images, the same in each process.
        batch_size: Images of a batch, of all processes together.
        rank: Number of this process.
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
        """Images of batch `number` that count in this process."""
        images = min(self.batch_size, len(self.sampler) - number * self.batch_size)  # type: ignore[arg-type]
        return shard_size(images, self.rank, self.count)

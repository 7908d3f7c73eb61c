"""Peak memory of a contender's training step."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from typing import Any

import torch

from snella.benchmark.contenders import Setting
from snella.benchmark.step import Runner, random_batch

_STEPS = 2


def peak_mib(name: str, setting: Setting, batch: int) -> dict[str, float]:
    """Peak memory of two training steps, in MiB.

    On a GPU what its allocator held at most. On the CPU the largest resident size of a process that does nothing else
    (`peak_rss_mib`) and how much of it came after the model and its optimiser were there (`peak_step_mib`): libraries
    and thread pools are in the first.
    """
    if torch.device(setting.device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
        _run(name, setting, batch)
        return {"peak_gpu_mib": round(torch.cuda.max_memory_allocated(setting.device) / 2**20, 1)}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, name, setting, batch, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"measuring the memory of {name!r} ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def _report(sender: Any, name: str, setting: Setting, batch: int, threads: int) -> None:
    """Run in a process of its own, and send what it needed."""
    torch.set_num_threads(threads)
    before = _run(name, setting, batch)
    peak = _peak_rss_mib()
    sender.send({"peak_rss_mib": round(peak, 1), "peak_step_mib": round(max(peak - before, 0.0), 1)})


def _run(name: str, setting: Setting, batch: int) -> float:
    """Take the steps; returns the peak so far, before the first."""
    runner, (images, labels) = Runner(name, setting), random_batch(setting, batch)
    before = _peak_rss_mib()
    for _ in range(_STEPS):
        runner.step(images, labels)
    return before


def _peak_rss_mib() -> float:
    """Largest resident size of this process until now."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)

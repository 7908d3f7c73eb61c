"""SNELLA's recomputation of inputs, compared with torch's selective activation checkpointing of blocks.

python benchmarks/selective_checkpointing.py              all models and checks; appends to the .jsonl file
python benchmarks/selective_checkpointing.py vit --rounds 9
python benchmarks/selective_checkpointing.py --table      writes the tables of src/snella/memory/README.md

The selective variants disable SNELLA's recomputation of inputs and run each block under `torch.utils.checkpoint` with
`create_selective_checkpoint_contexts`. `selective` saves the results of all matrix products, convolutions and
attention; `selective-linear` saves only the results of linear layers. Both recompute the rest of the block. The layer
is one operator, as under `torch.compile`, so the recomputation neither multiplies nor merges. `selective-compress`
saves the results of linear layers and the inputs of blocks in int8. `snella-modules` recomputes inputs without
tracking operations inside blocks.

Saved bytes refer to whole models with random weights, extrapolated from two depths if all blocks are identical. Step
times refer to models with fewer blocks; the steps of all variants are interleaved in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from documents import markdown_table, put_between
from model_rows import MethodRunner, Setting
from single_operations import peak_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import snella.compat.compile  # noqa: F401, registers the layer's operator
from snella.compat.compile import forward_in_graph
from snella.layer import SnellaLayer
from snella.memory import recompute
from snella.memory.origins import Layout, decode, encode
from snella.memory.recompute import mark_outputs, unmark_outputs
from snella_lab.bench.bench import ratio_fields
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parents[1] / "src" / "snella" / "memory" / "README.md"
_BEGIN, _END = "<!-- rows of benchmarks/selective_checkpointing.jsonl begin -->", "<!-- rows end -->"

SETTINGS = {
    "ViT-B/16, batch 4": Setting("vit_base_patch16_224", batch=4, depth=2, blocks=12),
    "ViT-B/16, batch 16": Setting("vit_base_patch16_224", batch=16, depth=2, blocks=12),
    # no drop path, because its random numbers differ between variants
    "Swin-B, batch 2": Setting(
        "swin_base_patch4_window7_224", batch=2, options={"depths": (1, 1, 3, 1), "drop_path_rate": 0.0}
    ),
    "ConvNeXt-B, batch 2": Setting("convnext_base", batch=2, options={"depths": (1, 1, 4, 1)}),
    "LLaMA, 256 tokens": Setting(
        "llama", batch=1, tokens=256, depth=2, blocks=32,
        options={"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8},
    ),
}  # fmt: skip
_BLOCKS = ("Block", "SwinTransformerBlock", "ConvNeXtBlock", "LlamaDecoderLayer")

_aten: Any = torch.ops.aten
LINEAR = [_aten.mm.default, _aten.addmm.default, cast(Any, torch.ops).snella.adapted_layer.default]
PRODUCTS = [
    *LINEAR,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# variant: method in `model_rows`
VARIANTS = {
    "lora": "lora",
    "snella": "snella",
    "snella-modules": "snella",
    "selective": "snella",
    "selective-linear": "snella",
    "snella-compress": "snella-compress",
    "selective-compress": "snella",
}
Encoded = tuple[Tensor, Layout]
Stored = tuple[Encoded, tuple[Tensor, ...]]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
POLICIES: dict[str, Callable[[], Contexts]] = {
    "selective": partial(create_selective_checkpoint_contexts, PRODUCTS),
    "selective-linear": partial(create_selective_checkpoint_contexts, LINEAR),
}


def checkpoint_blocks(
    model: nn.Module, contexts: Callable[[], Contexts], saving: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Disable SNELLA's recomputation of inputs, and checkpoint each block instead.

    `contexts` returns the contexts of a block's forward pass and of its recomputation, `saving` the context that saves
    a block's inputs.
    """

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saving():
            # the blocks draw no random numbers
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
            return checkpoint(forward, *args, **options, **kwargs)

    unmark_outputs(model)
    for block in model.modules():
        if isinstance(block, SnellaLayer):
            block.forward = partial(forward_in_graph, block)
        if type(block).__name__ in _BLOCKS:
            block.forward = partial(run, block.forward)


class _StoreInt8(TorchDispatchMode):
    """Dispatch mode that stores the results of linear layers in int8."""

    def __init__(self, stored: list[Stored]) -> None:
        super().__init__()
        self.stored = stored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and store its result."""
        output = func(*args, **(kwargs or {}))
        if func in LINEAR:
            y, *thresholds = output if isinstance(output, tuple) else (output,)
            self.stored.append((encode(y), tuple(thresholds)))
        return output


class _LoadInt8(TorchDispatchMode):
    """Dispatch mode that returns the stored results of linear layers instead of computing them."""

    def __init__(self, stored: list[Stored]) -> None:
        super().__init__()
        self.stored = stored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function or return its stored result."""
        if func not in LINEAR:
            return func(*args, **(kwargs or {}))
        encoded, thresholds = self.stored.pop(0)
        return (decode(*encoded), *thresholds) if thresholds else decode(*encoded)


def int8_contexts() -> Contexts:
    """Return contexts that store the results of linear layers in int8 and return them in the recomputation."""
    stored: list[Stored] = []
    return _StoreInt8(stored), _LoadInt8(stored)


def int8_hooks(record: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Return saved-tensor hooks that store activations in int8 and call `record` with each stored value."""

    def pack(tensor: Tensor) -> Tensor | Encoded:
        is_activation = tensor.is_floating_point() and tensor.requires_grad and not tensor.is_leaf
        packed = encode(tensor) if is_activation else tensor
        record(packed)
        return packed

    def unpack(packed: Tensor | Encoded) -> Tensor:
        return packed if isinstance(packed, Tensor) else decode(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Variant(MethodRunner):
    """Model, optimizer and batch of one variant."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(setting, VARIANTS[name])
        self._saved: list[Any] | None = None
        if name == "snella-modules":
            with patch("snella.memory.recompute.can_track", lambda module, compress: False):
                mark_outputs(self.model)
        elif name == "selective-compress":
            checkpoint_blocks(self.model, partial(self._recording, int8_contexts), partial(int8_hooks, self._record))
        elif name in POLICIES:
            checkpoint_blocks(self.model, partial(self._recording, POLICIES[name]))

    def _record(self, packed: Any) -> None:
        if self._saved is not None:
            self._saved.append(packed)

    def _recording(self, make: Callable[[], Contexts]) -> Contexts:
        """Create the contexts and record the results that the forward context saves."""
        contexts: Any = make()
        self._record(contexts[0].stored if isinstance(contexts[0], _StoreInt8) else contexts[0].storage)
        return contexts

    def saved_bytes(self) -> int:
        """Return the bytes saved by hooks and contexts, counting each storage once and excluding the model's."""

        def keep(tensor: Tensor) -> Tensor:
            self._record(tensor)
            return tensor

        self._saved = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward(self.batch)
        leaves = pytree.tree_leaves([dict(item) if isinstance(item, dict) else item for item in self._saved])
        tensors = [getattr(leaf, "val", leaf) for leaf in leaves]  # selective checkpointing wraps tensors
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        del loss
        self._saved = None
        return sum(storage.nbytes() for storage in storages.values())

    def loss_and_backward(self) -> Tensor:
        """Run a forward and backward pass, and discard the gradients."""
        loss = self.forward(self.batch)
        loss.backward()
        self.optimizer.zero_grad()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return the loss and all gradients."""
        loss = self.forward(self.batch)
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return {"loss": loss.detach(), **grads}


def saved_bytes(name: str, setting: Setting) -> int:
    """Return the saved bytes of the full model, extrapolated from two depths if its blocks are identical."""
    if setting.blocks is None:
        depths = {key: value for key, value in (setting.options or {}).items() if key != "depths"}
        return Variant(name, replace(setting, options=depths)).saved_bytes()
    one, two = (Variant(name, replace(setting, depth=depth)).saved_bytes() for depth in (1, 2))
    return one + (setting.blocks - 1) * (two - one)


def error_of(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the relative error of the factors' gradients."""
    factors = [name for name in exact if "snella_" in name]
    total = sum(float((grads[name] - exact[name]).square().sum()) for name in factors)
    return (total / sum(float(exact[name].square().sum()) for name in factors)) ** 0.5


def measure(title: str, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    saved = {name: saved_bytes(name, setting) for name in VARIANTS}
    variants = {name: Variant(name, setting) for name in VARIANTS}
    exact = variants["snella"].gradients()
    common = {"benchmark": "selective_checkpointing", "title": title, "model": setting.model, "batch": setting.batch}
    common |= {"tokens": setting.tokens, "depth": setting.depth, "blocks": setting.blocks, "options": setting.options}
    common |= {"rounds": rounds}
    rows = []
    for name, variant in variants.items():
        row = {**common, "variant": name, "kept_mib": round(saved[name] / 2**20, 2)}
        row["kept_over_lora"] = round(saved[name] / saved["lora"], 4)
        if name != "lora":
            grads = variant.gradients()
            row["loss_same_bits"] = torch.equal(grads["loss"], exact["loss"])
            row["gradients_same_bits"] = all(torch.equal(grads[key], exact[key]) for key in exact)
            row["gradient_error"] = float(f"{error_of(grads, exact):.3g}")
        # tensors of the step that are not saved for backward
        row["step_mib"] = round((peak_bytes(variant.loss_and_backward) - variant.saved_bytes()) / 2**20, 1)
        rows.append(row)
    del exact
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):  # round 0 warms up
        for name, variant in variants.items():
            seconds = variant.step()
            times[name] += [seconds] if round_number else []
    for row in rows:
        for reference in ("lora", "snella", "snella-compress"):
            row |= ratio_fields(reference, times[row["variant"]], times[reference])
        row |= {"step_s": round(statistics.median(times[row["variant"]]), 4), "clock": "process time"}
        row |= conditions("cpu")
    return rows


# checks on a tiny model -----------------------------------------------------------------------------------------------

TINY = Setting("vit_tiny_patch16_224", batch=4, side=32, depth=2)
CHECKED = ("snella", "selective-linear", "snella-compress", "selective-compress")


def check() -> list[dict[str, Any]]:
    """Return a row for each variant: compiled step, repeated backward pass, and DDP with two processes."""
    exact = {name: Variant(name, TINY).gradients() for name in CHECKED}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_distributed_steps, (folder,), nprocs=2)
        distributed: dict[str, Any] = torch.load(Path(folder, "grads.pt"))
    rows = []
    for name in CHECKED:

        def compiled(name: str = name) -> str:
            return _difference(_compiled_gradients(name), exact[name])

        grads = distributed[name]
        ddp = grads if isinstance(grads, str) else _difference(grads, exact[name])
        row = {"compile": _outcome(compiled), "repeated_backward": _outcome(partial(_repeat, name)), "ddp": ddp}
        rows.append({"benchmark": "selective_checks", "variant": name, **row, **conditions("cpu")})
    return rows


def _compiled_gradients(name: str) -> dict[str, Tensor]:
    """Return the gradients of a compiled step without graph breaks."""
    torch._dynamo.reset()
    variant = Variant(name if name.startswith("snella") else "snella", TINY)
    if name == "selective-compress":
        checkpoint_blocks(variant.model, int8_contexts, partial(int8_hooks, lambda packed: None))
    elif name in POLICIES:
        checkpoint_blocks(variant.model, POLICIES[name])
    variant.model.compile(backend="aot_eager", fullgraph=True)
    # the layer records its use, a side effect inside a checkpointed block
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        return variant.gradients()


def _repeat(name: str) -> str:
    """Run two backward passes through one graph."""
    variant = Variant(name, TINY)
    loss = variant.forward(variant.batch)
    loss.backward(retain_graph=True)
    loss.backward()
    return "runs"


def _distributed_steps(rank: int, folder: str) -> None:
    """Run a DDP step of each variant on half of the batch, and write the averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name in CHECKED:
        variant = Variant(name, TINY)
        half = slice(rank * TINY.batch // 2, (rank + 1) * TINY.batch // 2)
        variant.batch, variant.labels = variant.batch[half], variant.labels[half]
        inner, variant.model = variant.model, DistributedDataParallel(variant.model)
        variant.forward(variant.batch).backward()
        results[name] = {key: p.grad for key, p in inner.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(results, Path(folder, "grads.pt"))
    torch.distributed.destroy_process_group()


def _outcome(function: Callable[[], str]) -> str:
    """Return the result of the function, or the first sentence of its error."""
    try:
        return function()
    except Exception as error:  # the error is the outcome
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {(lines or [''])[0].partition('. ')[0].strip()}"


def _difference(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> str:
    """Describe the difference between gradients."""
    error = error_of(grads, exact)
    return f"runs, gradients differ by {error:.0e}" if error else "runs, same gradients"


def measure_frames(title: str, setting: Setting) -> dict[str, Any]:
    """Measure the cost per step of checking whether a tracked block's frame is running."""
    variant, seconds = Variant("snella", setting), [0.0, 0.0]
    is_running = recompute._TrackingMode.is_running

    def timed(mode: Any) -> bool:
        start = time.process_time()
        result = is_running(mode)
        seconds[0] += time.process_time() - start
        seconds[1] += 1
        return result

    variant.step()
    step_s = variant.step()
    with patch.object(recompute._TrackingMode, "is_running", timed):
        variant.step()
    row = {"benchmark": "tracking_frames", "title": title, "checks": int(seconds[1]), "checks_s": round(seconds[0], 6)}
    return {**row, "checks_over_step": round(seconds[0] / step_s, 6), "step_s": round(step_s, 4), **conditions("cpu")}


# page -----------------------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """Format the latest rows as Markdown."""
    latest = {(row["title"], row["variant"]): row for row in rows if row["benchmark"] == "selective_checkpointing"}
    names = list(VARIANTS)[1:]
    lines = []
    for title in SETTINGS:
        cells = []
        for name in names:
            row = latest[title, name]
            ratio = row["step_over_snella-compress" if name.endswith("compress") else "step_over_snella"]
            cells.append(f"{row['kept_over_lora']:.2f}, {ratio:.2f}, {row['step_mib']:.0f} MiB")
        lines.append([title, *cells])
    checks = {row["variant"]: row for row in rows if row["benchmark"] == "selective_checks"}
    check_lines = [
        [name, *(row[key] for key in ("compile", "repeated_backward", "ddp"))] for name, row in checks.items()
    ]
    frames = {row["title"]: row for row in rows if row["benchmark"] == "tracking_frames"}
    frame_lines = [[title, str(row["checks"]), f"{row['checks_over_step']:.2%}"] for title, row in frames.items()]
    return "\n\n".join(
        (
            markdown_table(["", *names], lines),
            markdown_table(["", "`torch.compile`", "repeated backward pass", "DDP, 2 processes"], check_lines),
            markdown_table(["", "frame checks per step", "share of step time"], frame_lines),
        )
    )


def update_page(page: Path = PAGE, rows_file: Path = ROWS) -> bool:
    """Write the tables into the page; return True if it changed."""
    return put_between(page, _BEGIN, _END, tables(read_rows(rows_file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="prefixes of `model:batch`, or `checks` or `frames`; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per variant")
    parser.add_argument("--table", action="store_true", help="only write the tables from the rows")
    parser.add_argument("--out", default=str(ROWS))
    args = parser.parse_args()
    if args.table:
        update_page()
        return
    torch.set_num_threads(1)

    def is_selected(key: str) -> bool:
        return not args.models or any(key.startswith(name) for name in args.models)

    for title, setting in SETTINGS.items():
        if is_selected(f"{setting.model}:{setting.batch}"):
            _append(args.out, measure(title, setting, args.rounds))
        if is_selected("frames") and setting.model in ("swin_base_patch4_window7_224", "llama"):
            _append(args.out, [measure_frames(title, setting)])
    if is_selected("checks"):
        _append(args.out, check())


def _append(path: str, rows: list[dict[str, Any]]) -> None:
    """Append and print rows."""
    append_rows(path, rows)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("versions", "command", "options")}, flush=True)


if __name__ == "__main__":
    main()

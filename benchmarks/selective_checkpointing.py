"""SNELLA's recomputation of inputs against torch's selective activation checkpointing of the blocks.

python benchmarks/selective_checkpointing.py              every model and the checks; appends to the .jsonl file
python benchmarks/selective_checkpointing.py vit --rounds 9
python benchmarks/selective_checkpointing.py --table      writes the table of src/snella/memory/README.md

`selective` and `selective-linear` run SNELLA without recomputation of inputs, and each block under
`torch.utils.checkpoint` with `create_selective_checkpoint_contexts`. The first keeps the results of all matrix
products, convolutions and attention, the second only those of linear layers; both recompute the rest of the block.
`selective-compress` keeps the results of linear layers in int8, and saved-tensor hooks keep the blocks' inputs in int8.
Steps of all variants are interleaved in one process. Vision models have random weights and fewer blocks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from model_rows import MethodRunner, Setting
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from snella.memory.compression import Layout, decode, encode
from snella.memory.recompute import unmark_outputs
from snella_lab.bench.bench import peak_bytes, quartiles
from snella_lab.bench.rows import append_rows, conditions, put_between, read_rows

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parents[1] / "src" / "snella" / "memory" / "README.md"
_BEGIN, _END = "<!-- rows of benchmarks/selective_checkpointing.jsonl begin -->", "<!-- rows end -->"

SETTINGS = {
    "ViT-B/16": Setting("vit_base_patch16_224", batch=4, depth=2, blocks=12),
    "Swin-B": Setting("swin_base_patch4_window7_224", batch=2, options={"depths": (1, 1, 3, 1)}),
    "ConvNeXt-B": Setting("convnext_base", batch=2, options={"depths": (1, 1, 4, 1)}),
    "LLaMA": Setting(
        "llama", batch=1, tokens=256, depth=2, blocks=32,
        options={"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8},
    ),
}  # fmt: skip
_BLOCKS = ("Block", "SwinTransformerBlock", "ConvNeXtBlock", "LlamaDecoderLayer")

_aten: Any = torch.ops.aten
LINEAR = [_aten.mm.default, _aten.addmm.default]
PRODUCTS = [
    *LINEAR,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# method of `model_rows` and kept operations; the variants without them are SNELLA and LoRA as they are
VARIANTS: dict[str, tuple[str, list[Any] | None]] = {
    "lora": ("lora", None),
    "snella": ("snella", None),
    "selective": ("snella", PRODUCTS),
    "selective-linear": ("snella", LINEAR),
    "snella-compress": ("snella-compress", None),
    "selective-compress": ("snella", LINEAR),
}
Encoded = tuple[Tensor, Layout]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def checkpoint_blocks(
    model: nn.Module,
    contexts: Callable[[], Contexts],
    saving: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Disable SNELLA's recomputation of inputs, and checkpoint each block instead.

    Args:
        model: The model.
        contexts: Returns the contexts of a block's forward pass and of its recomputation.
        saving: Returns the context in which a block's inputs are saved.
    """

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saving():
            # the blocks draw no random numbers
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
            return checkpoint(forward, *args, **options, **kwargs)

    unmark_outputs(model)
    for block in model.modules():
        if type(block).__name__ in _BLOCKS:
            block.forward = partial(run, block.forward)  # type: ignore[assignment]


class _KeepRounded(TorchDispatchMode):
    """Keeps the results of linear layers in int8."""

    def __init__(self, kept: list[Encoded]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and keep its result."""
        output = func(*args, **(kwargs or {}))
        if func in LINEAR:
            self.kept.append(encode(output))
        return output


class _ReturnRounded(TorchDispatchMode):
    """Returns the kept results instead of computing them."""

    def __init__(self, kept: list[Encoded]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function or return its kept result."""
        return decode(*self.kept.pop(0)) if func in LINEAR else func(*args, **(kwargs or {}))


def rounded_contexts() -> Contexts:
    """Return contexts that keep the results of linear layers in int8."""
    kept: list[Encoded] = []
    return _KeepRounded(kept), _ReturnRounded(kept)


def round_saved(note: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Return saved-tensor hooks that keep activations in int8 and call `note` with what they keep."""

    def pack(tensor: Tensor) -> Tensor | Encoded:
        is_activation = tensor.is_floating_point() and tensor.requires_grad and not tensor.is_leaf
        packed = encode(tensor) if is_activation else tensor
        note(packed)
        return packed

    def unpack(packed: Tensor | Encoded) -> Tensor:
        return packed if isinstance(packed, Tensor) else decode(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Variant(MethodRunner):
    """Model, optimizer and batch of one variant."""

    def __init__(self, name: str, setting: Setting) -> None:
        method, ops = VARIANTS[name]
        super().__init__(setting, method)
        self._kept: list[Any] | None = None
        if name == "selective-compress":
            checkpoint_blocks(self.model, partial(self._noting, rounded_contexts), partial(round_saved, self._note))
        elif ops is not None:
            make = partial(create_selective_checkpoint_contexts, ops)
            checkpoint_blocks(self.model, partial(self._noting, make))

    def _note(self, packed: Any) -> None:
        if self._kept is not None:
            self._kept.append(packed)

    def _noting(self, make: Callable[[], Contexts]) -> Contexts:
        """Make contexts and note what the first one keeps."""
        contexts: Any = make()
        self._note(contexts[0].kept if isinstance(contexts[0], _KeepRounded) else contexts[0].storage)
        return contexts

    def kept_bytes(self) -> int:
        """Return the bytes kept for the backward pass by hooks and contexts, each storage once, without the model's."""

        def keep(tensor: Tensor) -> Tensor:
            self._note(tensor)
            return tensor

        self._kept = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward(self.batch)
        leaves = pytree.tree_leaves([dict(kept) if isinstance(kept, dict) else kept for kept in self._kept])
        tensors = [getattr(leaf, "val", leaf) for leaf in leaves]  # selective checkpointing wraps tensors
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        del loss
        self._kept = None
        return sum(storage.nbytes() for storage in storages.values())

    def loss_and_backward(self) -> Tensor:
        """Run a forward and a backward pass; gradients are dropped."""
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


def kept_bytes(name: str, setting: Setting) -> int:
    """Return the kept bytes of the whole model, extrapolated from two depths if its blocks are identical."""
    if setting.blocks is None:
        return Variant(name, setting).kept_bytes()
    one, two = (Variant(name, replace(setting, depth=depth)).kept_bytes() for depth in (1, 2))
    return one + (setting.blocks - 1) * (two - one)


def error_of(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the relative error of all gradients."""
    total = sum(float((grads[name] - exact[name]).square().sum()) for name in exact if name != "loss")
    return (total / sum(float(exact[name].square().sum()) for name in exact if name != "loss")) ** 0.5


def measure(title: str, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    kept = {name: kept_bytes(name, setting) for name in VARIANTS}
    variants = {name: Variant(name, setting) for name in VARIANTS}
    exact = variants["snella"].gradients()
    common = {"benchmark": "selective_checkpointing", "title": title, "model": setting.model, "batch": setting.batch}
    common |= {"tokens": setting.tokens, "depth": setting.depth, "blocks": setting.blocks, "options": setting.options}
    common |= {"rounds": rounds}
    rows = []
    for name, variant in variants.items():
        row = {**common, "variant": name, "kept_mib": round(kept[name] / 2**20, 2)}
        row["kept_over_lora"] = round(kept[name] / kept["lora"], 4)
        if name not in ("lora", "snella"):
            grads = variant.gradients()
            row["loss_same_bits"] = torch.equal(grads["loss"], exact["loss"])
            row["gradients_same_bits"] = all(torch.equal(grads[key], exact[key]) for key in exact)
            row["gradient_error"] = float(f"{error_of(grads, exact):.3g}")
        # tensors that the step allocates, without the kept ones of the same depth
        row["step_mib"] = round((peak_bytes(variant.loss_and_backward) - variant.kept_bytes()) / 2**20, 1)
        rows.append(row)
    del exact
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):  # round 0 warms up
        for name, variant in variants.items():
            seconds = variant.step()
            times[name] += [seconds] if round_number else []
    for row in rows:
        for reference in ("lora", "snella", "snella-compress"):
            pairs = zip(times[row["variant"]], times[reference], strict=True)
            ratios = [step_s / reference_s for step_s, reference_s in pairs]
            row[f"step_over_{reference}"] = round(statistics.median(ratios), 3)
            row[f"step_over_{reference}_quartiles"] = [round(q, 3) for q in quartiles(ratios)]
        row |= {"step_s": round(statistics.median(times[row["variant"]]), 4), "clock": "process time"}
        row |= conditions("cpu")
    return rows


# checks on a tiny model -----------------------------------------------------------------------------------------------

TINY = Setting("vit_tiny_patch16_224", batch=4, side=32, depth=2)
CHECKED = ("snella", "selective-linear", "snella-compress", "selective-compress")


def check(name: str) -> dict[str, Any]:
    """Return the outcome of a compiled step, of a repeated backward pass, and of DDP with two processes."""
    exact = Variant(name, TINY).gradients()

    def compiled() -> str:
        torch._dynamo.reset()
        variant = Variant("snella" if name.startswith("selective") else name, TINY)
        if name == "selective-compress":
            checkpoint_blocks(variant.model, rounded_contexts, partial(round_saved, lambda packed: None))
        elif name.startswith("selective"):
            ops = [*LINEAR, cast(Any, torch.ops).snella.adapted_layer.default]
            checkpoint_blocks(variant.model, partial(create_selective_checkpoint_contexts, ops))
        variant.model.compile(backend="aot_eager", fullgraph=True)
        return f"runs, gradients differ by {error_of(variant.gradients(), exact):.1g}"

    def repeated() -> str:
        variant = Variant(name, TINY)
        loss = variant.forward(variant.batch)
        loss.backward(retain_graph=True)
        loss.backward()
        return "runs"

    def distributed() -> str:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_distributed_step, (name, folder), nprocs=2)
            grads = torch.load(Path(folder, "grads.pt"))
        return f"runs, gradients differ by {error_of(grads, exact):.1g}"

    checks = {"compile": compiled, "repeated_backward": repeated, "ddp": distributed}
    return {"benchmark": "selective_checks", "variant": name, **{key: _outcome(f) for key, f in checks.items()}}


def _outcome(function: Callable[[], str]) -> str:
    """Return the result of the function, or the first line of its error."""
    try:
        return function()
    except Exception as error:  # the outcome is the error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {(lines or [''])[0]}"


def _distributed_step(rank: int, name: str, folder: str) -> None:
    """Run a step on half of the batch with DDP and write the averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    variant = Variant(name, TINY)
    half = slice(rank * TINY.batch // 2, (rank + 1) * TINY.batch // 2)
    variant.batch, variant.labels = variant.batch[half], variant.labels[half]
    inner, variant.model = variant.model, DistributedDataParallel(variant.model)
    variant.forward(variant.batch).backward()
    if rank == 0:
        torch.save({key: p.grad for key, p in inner.named_parameters() if p.grad is not None}, Path(folder, "grads.pt"))
    torch.distributed.destroy_process_group()


# page -----------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Format the latest rows as Markdown tables."""
    latest = {(row["title"], row["variant"]): row for row in rows if row["benchmark"] == "selective_checkpointing"}
    lines = ["| | " + " | ".join(list(VARIANTS)[1:]) + " |", "|---" * len(VARIANTS) + "|"]
    for title in SETTINGS:
        cells = []
        for name in list(VARIANTS)[1:]:
            row = latest[title, name]
            reference = "snella-compress" if name.endswith("compress") else "snella"
            cell = f"{row['kept_over_lora']:.2f}"
            cells.append(cell if name == reference else f"{cell}, {row[f'step_over_{reference}']:.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    checks = {row["variant"]: row for row in rows if row["benchmark"] == "selective_checks"}
    lines += ["", "| | `torch.compile` | repeated backward pass | DDP, 2 processes |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(row[key] for key in ('compile', 'repeated_backward', 'ddp'))} |"
        for name, row in checks.items()
    ]
    return "\n".join(lines)


def update_page(page: Path = PAGE, rows_file: Path = ROWS) -> bool:
    """Write the tables into the page; return True if it changed."""
    return put_between(page, _BEGIN, _END, table(read_rows(rows_file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="prefixes of timm names, `llama` or `checks`; default all")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per variant")
    parser.add_argument("--table", action="store_true", help="only write the table from the rows")
    parser.add_argument("--out", default=str(ROWS))
    args = parser.parse_args()
    if args.table:
        update_page()
        return
    torch.set_num_threads(1)
    for title, setting in SETTINGS.items():
        if not args.models or any(setting.model.startswith(name) for name in args.models):
            rows = measure(title, setting, args.rounds)
            append_rows(args.out, rows)
            for row in rows:
                shown = (
                    "variant",
                    "kept_mib",
                    "kept_over_lora",
                    "gradients_same_bits",
                    "gradient_error",
                    "step_mib",
                    "step_over_lora",
                )
                print(title, {key: row.get(key) for key in (*shown, "step_over_snella", "step_s")}, flush=True)
    if not args.models or "checks" in args.models:
        for name in CHECKED:
            row = {**check(name), **conditions("cpu")}
            append_rows(args.out, [row])
            print(row, flush=True)


if __name__ == "__main__":
    main()

"""Time to switch a loaded model to another task: `snella.hotswap`, PEFT and scattered entries.

    python benchmarks/hotswap.py                  # ViT-B/16, r 8; appends to benchmarks/hotswap.jsonl
    python benchmarks/hotswap.py vit_small_patch16_224 30      # 30 rounds of two switches

All methods switch between two tasks, interleaved in one process. Rows contain medians and minima of wall-clock and CPU
time; CPU time is less sensitive to other load. Each method has its own model, which is merged unless the method's name
contains "unmerged". Before timing, the outputs of `snella.hotswap` are compared with a model loaded for the other task.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from snella import SnellaConfig, hotswap
from snella.compat.hotswap import AdapterValues
from snella.compat.sparse_file import Entries, SparsePatch
from snella.layer import SnellaLayer
from snella_app.methods.peft_methods import without_harmless_warnings
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_name("hotswap.jsonl")
R, SPARSITY, TASKS = 8, 0.7, ("one", "two")
TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]
REFERENCE = "peft lora set_adapter + merge"


def backbone(name: str) -> nn.Module:
    """Build a timm model with random weights from a fixed seed."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def save_adapters(name: str, config: Any, folder: Path) -> None:
    """Save an adapter with random values for each task."""
    for seed, task in enumerate(TASKS, start=1):
        with without_harmless_warnings():
            model = get_peft_model(backbone(name), config())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        model.save_pretrained(folder / task)


def load_both(name: str, folder: Path) -> PeftModel:
    """Load a model with both tasks' adapters, and merge the first."""
    with without_harmless_warnings():
        model = PeftModel.from_pretrained(backbone(name), folder / TASKS[0], adapter_name=TASKS[0])
        model.load_adapter(folder / TASKS[1], adapter_name=TASKS[1])
    model.merge_adapter([TASKS[0]])
    return model.eval()


def set_and_merge(model: PeftModel) -> Callable[[str], None]:
    """Return a function that switches to a task with PEFT: unmerge, activate, merge."""

    def switch(task: str) -> None:
        model.unmerge_adapter()
        model.set_adapter(task)
        model.merge_adapter()

    return switch


def scattered(name: str, sparsity: float) -> tuple[nn.Module, Callable[[str], None]]:
    """Return a plain model, and a function that scatters a task's in-memory entries into it, as in SHiRA."""
    model, patches, current = backbone(name), {}, []
    for seed, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(seed)
        entries, shapes = {}, {}
        for key, weight in model.named_parameters():
            if key.endswith("weight") and any(f".{target}." in key for target in TARGETS):
                count = round((1 - sparsity) * weight.numel())
                indices = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
                entries[key] = Entries(indices, torch.randn(count, generator=generator) * 1e-3)
                shapes[key] = [*weight.shape]
        patches[task] = SparsePatch(entries, {}, shapes)

    def switch(task: str) -> None:
        if current:
            patches[current.pop()].remove()
        patches[task].apply(model, check_base=False)
        current.append(task)

    return model, switch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", default="vit_base_patch16_224", help="timm model")
    parser.add_argument("rounds", nargs="?", type=int, default=20, help="rounds of two switches")
    args = parser.parse_args()
    name, rounds = args.backbone, args.rounds
    temporary = tempfile.TemporaryDirectory()
    root = Path(temporary.name)
    snella = partial(SnellaConfig, r=R, target_modules=TARGETS, target_sparsity=SPARSITY, init_sparsity=SPARSITY)
    lora = partial(LoraConfig, r=R, lora_alpha=R, target_modules=TARGETS, init_lora_weights=False)
    # torch warns if this is unset; PEFT's indices are valid
    torch.sparse.check_sparse_tensor_invariants.disable()
    shira = partial(ShiraConfig, r=R, target_modules=TARGETS, random_seed=0)
    for kind, config in (("snella", snella), ("lora", lora), ("shira", shira)):
        save_adapters(name, config, root / kind)

    def loaded(kind: str) -> PeftModel:
        with without_harmless_warnings():
            return PeftModel.from_pretrained(backbone(name), root / kind / TASKS[0]).eval()

    in_memory, from_file, unmerged = loaded("snella"), loaded("snella"), loaded("lora")
    in_memory.merge_adapter()
    from_file.merge_adapter()
    values = {task: AdapterValues.read(root / "snella" / task) for task in TASKS}
    peft_models = {kind: load_both(name, root / kind) for kind in ("snella", "lora", "shira")}
    switches: dict[str, tuple[nn.Module, Callable[[str], Any]]] = {
        REFERENCE: (peft_models["lora"], set_and_merge(peft_models["lora"])),
        "peft snella set_adapter + merge": (peft_models["snella"], set_and_merge(peft_models["snella"])),
        "peft shira set_adapter + merge": (peft_models["shira"], set_and_merge(peft_models["shira"])),
        "peft lora hotswap_adapter, from file, unmerged": (
            unmerged,
            lambda task: hotswap_adapter(unmerged, str(root / "lora" / task), "default", torch_device="cpu"),
        ),
        "snella hotswap, in memory": (in_memory, lambda task: hotswap(in_memory, values[task])),
        "snella hotswap, from file": (from_file, lambda task: hotswap(from_file, root / "snella" / task)),
        "scatter, sparsity 0.97": scattered(name, 0.97),
        "scatter, sparsity 0.99": scattered(name, 0.99),
    }
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        for method in ("snella hotswap, in memory", "snella hotswap, from file"):
            model, switch = switches[method]
            switch(TASKS[1])
            expected = PeftModel.from_pretrained(backbone(name), root / "snella" / TASKS[1]).eval().merge_and_unload()
            if not torch.equal(model(images), expected(images)):
                raise SystemExit(f"the outputs of {method!r} differ from those of a model loaded for the task")
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in switches}
    for number in range(2 * rounds + 4):  # the first four compute thresholds and compile
        for method, (_, switch) in switches.items():
            start = time.perf_counter(), time.process_time()
            switch(TASKS[number % 2])
            if number >= 4:
                times[method].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    adapted = sum(m.out_features * m.in_features for m in in_memory.modules() if isinstance(m, SnellaLayer))
    rows = []
    for method, durations in times.items():
        row: dict[str, Any] = {"benchmark": "hotswap", "backbone": name, "adapted_weights": adapted, "r": R}
        row |= {"sparsity": SPARSITY, "method": method, "switches": len(durations)}
        for k, kind in enumerate(("wall", "cpu")):
            times_s, reference = [pair[k] for pair in durations], [pair[k] for pair in times[REFERENCE]]
            row[f"{kind}_median_ms"] = round(median(times_s) * 1e3, 2)
            row[f"{kind}_min_ms"] = round(min(times_s) * 1e3, 2)
            ratios = [a / b for a, b in zip(times_s, reference, strict=True)]
            row[f"{kind}_over_reference"] = round(median(ratios), 3)
            row[f"{kind}_min_over_reference"] = round(min(times_s) / min(reference), 3)
        rows.append({**row, **conditions("cpu")})
        print(method, {key: row[key] for key in row if key.startswith(("wall", "cpu"))})
    append_rows(ROWS, rows)


if __name__ == "__main__":
    main()

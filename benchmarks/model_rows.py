"""Saved tensors and single-thread CPU step time of SNELLA, PEFT's LoRA and full fine-tuning on more models.

python benchmarks/model_rows.py                       all models and settings; appends to model_rows.jsonl
python benchmarks/model_rows.py vit_large --rounds 5  models by name prefix

Autograd hooks count each saved storage once. Large models are built with their first blocks only. As all blocks are
identical, two depths determine the exact bytes of the full model; time ratios refer to the shorter model, whose depth
is recorded in the row. Steps of all methods are interleaved in one process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella_app.training.memory import record_forward
from snella_lab.bench.bench import ratio_fields
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions

_VISION = r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_LANGUAGE = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_CLASSES, _VOCABULARY = 100, 1000


@dataclass(frozen=True)
class Setting:
    """A model and its training settings.

    Args:
        model: A timm model name, or `llama`.
        batch: Batch size.
        tokens: Sequence length of `llama`.
        side: Image size; None uses the model's default.
        depth: Number of blocks to build; None builds all.
        blocks: Number of blocks in the full model.
        r: Rank of the adapters.
        autocast: Run steps under bfloat16 autocast.
        frozen: Dtype of the frozen weights.
        fused: Use fused attention in Swin (timm's `TIMM_FUSED_ATTN=2`).
        options: Other options of the model or its configuration.
    """

    model: str
    batch: int = 4
    tokens: int = 0
    side: int | None = None
    depth: int | None = None
    blocks: int | None = None
    r: int = 8
    autocast: bool = False
    frozen: str = "float32"
    fused: bool = False
    options: dict[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return torch.bfloat16 if self.frozen == "bfloat16" else torch.float32


SETTINGS = [
    Setting("vit_small_patch14_dinov2", batch=16, side=42),
    Setting("vit_base_patch16_224", batch=4),
    Setting("vit_base_patch16_224", batch=16),
    Setting("vit_base_patch16_224", batch=4, r=32),
    Setting("vit_base_patch16_224", batch=16, depth=4, blocks=12, autocast=True),
    Setting("vit_base_patch16_224", batch=16, depth=4, blocks=12, autocast=True, frozen="bfloat16"),
    Setting("vit_large_patch16_224", batch=4, depth=4, blocks=24),
    Setting("vit_huge_patch14_224", batch=4, depth=4, blocks=32),
    Setting("swin_base_patch4_window7_224", batch=4),
    Setting("swin_base_patch4_window7_224", batch=4, fused=True),
    Setting("convnext_base", batch=4),
    Setting("llama", batch=1, tokens=512, depth=2, blocks=32),
]
# options except rank, modules and sparsity
SNELLA = {
    "snella": {},
    "snella-bf16-gradient": {"weight_gradient": "bfloat16"},
    "snella-sample": {"weight_gradient": "sample:1/2"},
    "snella-compress": {"compress_activations": True},
    "snella-compress-sample": {"compress_activations": True, "weight_gradient": "sample:1/2"},
    "snella-keep-delta": {"cache_delta": True},
}
METHODS = ["lora", "full", *SNELLA]


def build(setting: Setting) -> nn.Module:
    """Build the model without adapters, with random weights from a fixed seed."""
    torch.manual_seed(0)
    if setting.model == "llama":
        # LLaMA-7B's blocks with a small vocabulary; embedding and head are not adapted
        options = {"vocab_size": _VOCABULARY, "num_hidden_layers": setting.depth or 32, **(setting.options or {})}
        return LlamaForCausalLM(LlamaConfig(**options))
    timm.layers.set_fused_attn(True, experimental=setting.fused)
    options = dict(setting.options or {})
    options |= {} if setting.depth is None else {"depth": setting.depth}
    options |= {} if setting.side is None else {"img_size": setting.side}
    return timm.create_model(setting.model, num_classes=_CLASSES, **options)


def adapted(setting: Setting, method: str) -> nn.Module:
    """Build the model, adapted with one method."""
    model = build(setting)
    if method == "full":
        return model
    is_language = setting.model == "llama"
    common: dict[str, Any] = {"r": setting.r, "target_modules": _LANGUAGE if is_language else _VISION}
    head = None if is_language else [next(name for name, _ in model.named_modules() if name in ("head", "head.fc"))]
    common["modules_to_save"] = head
    model.to(setting.dtype)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(lora_alpha=setting.r, **common))
    else:
        config = SnellaConfig(target_sparsity=0.7, init_sparsity=0.7, **common, **SNELLA[method])
        model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class MethodRunner:
    """Model, optimizer and batch of one method."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.setting, self.model = setting, adapted(setting, name).train()
        self.optimizer = create_snella_optimizer(self.model, lr=1e-4)
        if name.startswith("snella"):
            BudgetAllocator(self.model, total_epochs=100, steps_per_epoch=100).attach(self.optimizer)
        torch.manual_seed(1)
        if setting.model == "llama":
            self.batch = torch.randint(0, _VOCABULARY, (setting.batch, setting.tokens))
        else:
            self.batch = torch.randn(setting.batch, 3, setting.side or 224, setting.side or 224)
        self.labels = torch.randint(0, _CLASSES, (setting.batch,))

    def forward(self, batch: Tensor) -> Tensor:
        """Compute the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.autocast):
            if self.setting.model == "llama":
                return self.model(input_ids=batch, labels=batch, use_cache=False).loss
            return nn.functional.cross_entropy(self.model(batch.to(self.setting.dtype)).float(), self.labels)

    def step(self) -> float:
        """Run a training step and return its CPU seconds."""
        start = time.process_time()
        self.forward(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def saved_bytes(self) -> int:
        """Return the bytes saved by autograd."""
        return record_forward(_Loss(self.model, self.forward), self.batch).saved_bytes


class _Loss(nn.Module):
    """Module that computes the loss of a model."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, batch: Tensor) -> Tensor:
        """Compute the loss."""
        return self.function(batch)


def saved_bytes(setting: Setting, name: str) -> int:
    """Return the saved bytes of the full model, extrapolated from two depths if only some blocks are built."""
    if setting.depth is None or setting.blocks is None:
        return MethodRunner(setting, name).saved_bytes()
    one_block, two_blocks = (MethodRunner(replace(setting, depth=depth), name).saved_bytes() for depth in (1, 2))
    return one_block + (setting.blocks - 1) * (two_blocks - one_block)


def measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each method."""
    names = [name for name in METHODS if name != "full" or setting.frozen == "float32"]
    saved = {name: saved_bytes(setting, name) for name in names}
    gc.collect()
    runners = {name: MethodRunner(setting, name) for name in names} if rounds else {}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.step()
    for _ in range(rounds):
        for name, runner in runners.items():
            times[name].append(runner.step())
    described = {key: value for key, value in vars(setting).items() if value is not None and value != 0}
    common = {"benchmark": "model_rows", **described, "sparsity": 0.7, "rounds": rounds, "clock": "process time"}
    rows = []
    for name in names:
        row = {**common, **conditions("cpu"), "method": name, "kept_mib": round(saved[name] / 2**20, 1)}
        row["kept_over_lora"] = round(saved[name] / saved["lora"], 4)
        if rounds:
            row |= {"step_s": round(statistics.median(times[name]), 4)}
            row |= ratio_fields("lora", times[name], times["lora"])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="name prefixes; default: all")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps per method; 0 only counts bytes")
    parser.add_argument("--autocast", action="store_true", help="only the settings with autocast")
    parser.add_argument("--out", default=str(Path(__file__).parent / "model_rows.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for setting in SETTINGS:
        is_selected = not args.models or any(setting.model.startswith(name) for name in args.models)
        if not is_selected or (args.autocast and not setting.autocast):
            continue
        rows = measure(setting, args.rounds)
        append_rows(args.out, rows)
        for row in rows:
            shown = ("method", "kept_mib", "kept_over_lora", "step_s", "step_over_lora")
            print(setting, {key: row.get(key) for key in shown}, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()

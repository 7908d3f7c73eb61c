"""Training loops of `many_devices.py`: a tiny model with several loops and parallelization engines."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella.matrices import AdaptedMatrix

RESUMED_FROM = {4: 2, 1: 4}
"""Number of processes that saved the checkpoint, by number of processes that resume it."""
STEPS, SAVED_AT, PER_EPOCH = 12, 6, 3
BATCH, SIDE, CLASSES = 16, 16, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
LR = 1e-2
SINGLE = "one process"
SINGLE_CAST = "one process, cast parameters"
"""Reference of FSDP and ZeRO in bfloat16, which cast the parameters instead of using autocast."""
COMPILER = "aot_eager"
"""Backend of torch.compile; the default backend compiles C++ for minutes."""


def digest_of(matrices: list[AdaptedMatrix]) -> str:
    """Return a hash of budgets and sparse updates, which depend on the thresholds."""
    hasher = hashlib.sha256()
    for matrix in matrices:
        hasher.update(f"{matrix.name} {matrix.budget}".encode())
        hasher.update(matrix.sparse_update().detach().numpy().tobytes())  # Δ·(|Δ| - threshold)
    return hasher.hexdigest()[:12]


def make_model(has_allocator: bool = True) -> nn.Module:
    """Build the adapted tiny ViT, identical in all processes."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    base = ViTForImageClassification(
        ViTConfig(**sizes, image_size=SIDE, patch_size=8, num_channels=1, num_labels=CLASSES)
    )
    settings: dict[str, Any] = {"impl": "eager", "modules_to_save": ["classifier"]}
    sparsity = {} if has_allocator else {"init_sparsity": 0.7, "target_sparsity": 0.7}
    return peft.get_peft_model(base, SnellaConfig(r=4, target_modules=TARGETS, **settings, **sparsity))


def images() -> tuple[Tensor, Tensor]:
    """Return the images of all steps, `[steps·batch, 1, side, side]`, and their labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (STEPS * BATCH,), generator=generator)
    noise = torch.randn(len(labels), 1, SIDE, SIDE, generator=generator)
    return noise + torch.linspace(-1, 1, CLASSES)[labels][:, None, None, None], labels


def local_batches(step: int, accumulated: int) -> list[tuple[Tensor, Tensor]]:
    """Return this process's share of each micro-batch in a step."""
    X, y = images()
    rank, count = rank_and_count()
    parts = []
    for start in range(step * BATCH, (step + 1) * BATCH, BATCH // accumulated):
        share = BATCH // accumulated // count
        indices = slice(start + rank * share, start + (rank + 1) * share)
        parts.append((X[indices], y[indices]))
    return parts


def rank_and_count() -> tuple[int, int]:
    """Return the rank and the number of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class CommunicatedBytes(TorchDispatchMode):
    """Dispatch mode that sums the bytes of collectives per process: the larger of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives are dispatched separately
        output = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            sizes = [
                sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(part) if isinstance(leaf, Tensor))
                for part in (*args, output)
            ]
            self.total += max(sizes)
        return output


def count_bytes(allocator: Any) -> list[int]:
    """Return a list that receives the bytes that the allocator communicates in each step."""
    per_step: list[int] = []
    step = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with CommunicatedBytes() as mode:
                result = function(*args, **kwargs)
            step[0] += mode.total
            return result

        return call

    finish = allocator._finish_step
    allocator._update_importance = counted(allocator._update_importance)
    allocator._allocate = counted(allocator._allocate)

    def finish_step(number: int) -> None:
        finish(number)
        per_step.append(step[0])
        step[0] = 0

    allocator._finish_step = finish_step
    return per_step


@dataclass
class Cell:
    """A training run: loop, parallelization engine and option."""

    loop: str
    engine: str
    option: str
    folder: Path
    has_allocator: bool = True
    first: int = 0
    """Step to resume from."""
    losses: list[float] = field(default_factory=list)
    allocator_bytes: list[int] = field(default_factory=list)
    budgets: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    """Hash of this process's budgets and sparse updates."""
    saved_adapters: int = 0
    """Adapter files written by this process, if not by PEFT."""

    @property
    def accumulated(self) -> int:
        """Micro-batches per step."""
        return 2 if self.option == "accumulation" else 1

    def checkpoint(self, count: int) -> Path:
        """Return the folder of the checkpoint written by `count` processes."""
        mode = "" if self.has_allocator else "-fixed"
        return self.folder / f"{self.loop}-{self.engine}-{self.option}{mode}-{count}".replace(" ", "-")


def attach(cell: Cell, model: nn.Module, optimizer: Any) -> Any:
    """Attach an allocator and count its communicated bytes."""
    if not cell.has_allocator:
        return None
    allocator = BudgetAllocator(model, total_epochs=STEPS // PER_EPOCH, steps_per_epoch=PER_EPOCH).attach(optimizer)
    cell.allocator_bytes = count_bytes(allocator)
    return allocator


def train_steps(cell: Cell, train_step: Callable[[int], list[float]], save: Callable[[], None]) -> None:
    """Record the mean loss of the micro-batches in each step, and save a checkpoint."""
    for step in range(cell.first, STEPS):
        losses = train_step(step)
        cell.losses.append(sum(losses) / len(losses))
        if step + 1 == SAVED_AT and not cell.first:
            save()


def reset_accelerate() -> None:
    """Reset Accelerate's global state, so that the next run can choose another engine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def check_engine(cell: Cell, wrapped: nn.Module) -> None:
    """Raise an error if the loop replaced the engine, as Accelerate does on a CPU."""
    wrapped = getattr(wrapped, "_orig_mod", wrapped)
    expected = {
        "FSDP1": isinstance(wrapped, FullyShardedDataParallel),
        "FSDP2": isinstance(wrapped, FSDPModule),
        "ZeRO": type(wrapped).__module__.startswith("deepspeed"),
    }
    if not expected.get(cell.engine.partition("-")[0], True):
        raise RuntimeError(f"Accelerate ignores the plugin on a CPU and uses {type(wrapped).__name__}")


def run_torchrun(cell: Cell) -> dict[str, Tensor]:
    """Train in a plain loop and return the full final state."""
    if cell.engine.startswith("ZeRO"):
        return _run_deepspeed(cell)
    model = make_model(cell.has_allocator)
    if cell.engine == SINGLE_CAST and not cell.has_allocator:  # DeepSpeed also rounds the initial weights
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    if cell.option == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = _wrap(cell, model)
    optimizer = create_snella_optimizer(wrapped, lr=LR)
    allocator = attach(cell, wrapped, optimizer)
    if cell.first:
        _load(cell, wrapped, optimizer)
    if cell.option == "compile":
        wrapped.compile(backend=COMPILER)
    is_autocast = cell.option == "bf16" and cell.engine in (SINGLE, "DDP")
    is_cast = cell.engine == SINGLE_CAST
    wrapped.train()

    def train_step(step: int) -> list[float]:
        parts, losses = local_batches(step, cell.accumulated), []
        for number, (x, y) in enumerate(parts):
            is_last = number == len(parts) - 1
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_autocast)
            with _syncing(cell, wrapped, is_last), autocast, _cast_parameters(wrapped, is_cast):
                outputs = wrapped(pixel_values=x.bfloat16() if is_cast else x)
                loss = cross_entropy(outputs.logits.float(), y)
                (loss / len(parts)).backward()
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
        return losses

    train_steps(cell, train_step, lambda: _save(cell, wrapped, model, optimizer))
    if allocator is not None:
        cell.budgets = allocator.budgets
    return full_state(wrapped)


def _cast_parameters(model: nn.Module, is_cast: bool) -> contextlib.AbstractContextManager[Any]:
    """Cast the parameters to bfloat16 for a forward and a backward pass; gradients are cast back to float32."""
    if not is_cast:
        return contextlib.nullcontext()
    half = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    # unlike functional_call, includes the backward pass, which recomputes inputs
    return _reparametrize_module(model, half)  # type: ignore[no-any-return]


def _wrap(cell: Cell, model: nn.Module) -> nn.Module:
    """Wrap a model with the engine."""
    if rank_and_count()[1] == 1:
        return model
    half = torch.bfloat16 if cell.option == "bf16" else None
    if cell.engine == "DDP":
        return DistributedDataParallel(model)
    if cell.engine == "FSDP1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({ViTLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(param_dtype=half) if half else None,
        )
    if cell.engine == "FSDP2":
        policy = MixedPrecisionPolicy(param_dtype=half)
        for module in model.modules():
            if isinstance(module, ViTLayer):
                fully_shard(module, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    return model


def _syncing(cell: Cell, model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Average gradients only after the last micro-batch of a step."""
    if rank_and_count()[1] == 1:
        return contextlib.nullcontext()
    if cell.engine == "FSDP2":
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    elif cell.engine in ("DDP", "FSDP1") and not is_last:
        return model.no_sync()  # type: ignore[operator,no-any-return]
    return contextlib.nullcontext()


def _save(cell: Cell, wrapped: nn.Module, model: nn.Module, optimizer: Any) -> None:
    """Save the full state on rank 0."""
    rank, count = rank_and_count()
    if count == 1:
        return
    # without CPU offload, because FSDP1 on a CPU frees or overwrites state that it offloads
    weights, state = get_state_dict(wrapped, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        folder = cell.checkpoint(count)
        folder.mkdir(parents=True)
        torch.save({"model": weights, "optimizer": state}, folder / "state.pt")
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]


def _load(cell: Cell, wrapped: nn.Module, optimizer: Any) -> None:
    """Load the state saved by a different number of processes."""
    _, count = rank_and_count()
    saved = torch.load(cell.checkpoint(RESUMED_FROM[count]) / "state.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        wrapped, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )


def _run_deepspeed(cell: Cell) -> dict[str, Tensor]:
    """Train with `deepspeed.initialize`."""
    import deepspeed

    _, count = rank_and_count()
    model = make_model(cell.has_allocator)
    if cell.option == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = create_snella_optimizer(model, lr=LR)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(cell))
    attach(cell, model, optimizer)
    if cell.first:
        engine.load_checkpoint(str(cell.checkpoint(RESUMED_FROM[count])))
    if cell.option == "compile":
        engine.compile(backend=COMPILER)
    engine.train()

    def train_step(step: int) -> list[float]:
        losses = []
        for x, y in local_batches(step, cell.accumulated):
            outputs = engine(pixel_values=x.bfloat16() if cell.option == "bf16" else x)
            loss = cross_entropy(outputs.logits.float(), y)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        return losses

    def save() -> None:
        engine.save_checkpoint(str(cell.checkpoint(count)))
        state = deepspeed_state(model)
        if rank_and_count()[0] == 0:
            model.save_pretrained(cell.checkpoint(count), state_dict=state)  # type: ignore[operator]

    train_steps(cell, train_step, save)
    return deepspeed_state(model)


def deepspeed_config(cell: Cell) -> dict[str, Any]:
    """Return DeepSpeed's configuration; its default clips gradients to a norm of 1."""
    _, count = rank_and_count()
    return {
        "train_micro_batch_size_per_gpu": BATCH // count // cell.accumulated,
        "gradient_accumulation_steps": cell.accumulated,
        "zero_optimization": {"stage": int(cell.engine[-1])},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": cell.option == "bf16"},
    }


def deepspeed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the full state of a model sharded by ZeRO."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def run_accelerate(cell: Cell) -> dict[str, Tensor]:
    """Train with Accelerate and return the full final state."""
    reset_accelerate()
    _, count = rank_and_count()
    plugins: dict[str, Any] = {}
    if cell.engine.startswith("FSDP"):
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=int(cell.engine[-1]),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ViTLayer"],
            state_dict_type="FULL_STATE_DICT" if cell.engine == "FSDP1" else "SHARDED_STATE_DICT",
            use_orig_params=True,
        )
    elif cell.engine.startswith("ZeRO"):
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(cell))
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if cell.option == "bf16" else "no",
        gradient_accumulation_steps=cell.accumulated,
        dynamo_backend=COMPILER if cell.option == "compile" else "no",
        **plugins,
    )
    model = make_model(cell.has_allocator)
    if cell.option == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = create_snella_optimizer(model, lr=LR)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    check_engine(cell, wrapped)
    allocator = attach(cell, wrapped, optimizer)
    if cell.first:
        accelerator.load_state(str(cell.checkpoint(RESUMED_FROM[count])))
    wrapped.train()

    def train_step(step: int) -> list[float]:
        losses = []
        for x, y in local_batches(step, cell.accumulated):
            with accelerator.accumulate(wrapped):
                loss = wrapped(pixel_values=x, labels=y).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    def save() -> None:
        if count == 1:
            return
        accelerator.save_state(str(cell.checkpoint(count)), safe_serialization=False)
        if accelerator.is_main_process:
            # check_engine accepts only DDP, whose processes all have the full state
            accelerator.unwrap_model(wrapped, keep_torch_compile=False).save_pretrained(cell.checkpoint(count))

    train_steps(cell, train_step, save)
    if allocator is not None:
        cell.budgets = allocator.budgets
    return full_state(wrapped)


def full_state(wrapped: nn.Module) -> dict[str, Tensor]:
    """Return the full state of a model wrapped for DDP or FSDP."""
    wrapped = getattr(wrapped, "_orig_mod", wrapped)
    if rank_and_count()[1] == 1:
        return wrapped.state_dict()
    return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))

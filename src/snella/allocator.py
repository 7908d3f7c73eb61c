"""Lowers the global budget while training runs and allocates it among the matrices by their importance."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from snella._text import listed
from snella.allocation import allocate, budget_at
from snella.importance import ImportanceTracker, is_sharded
from snella.matrices import AdaptedMatrix, adapted_matrices
from snella.optimizer import MATCHER_ATTRIBUTE

_STATE_KEY = "snella_allocator"  # in the first parameter group of an optimizer's state
_FORMAT = 1
_HISTORY_PARTS = 100  # points of a curve that a report draws
_GRADIENT_STEPS = 5  # a head that starts at zero, or a block dropped by drop-path, has none in the first one or two

__all__ = ["BudgetAllocator", "allocate"]


class BudgetAllocator:
    """The layer-level competition of SNELLA (section 3.3, Algorithm 1 of arXiv 2510.24037).

    Every optimizer step updates the importance of every matrix; every epoch, or every N steps (`realloc_every`), the
    global budget follows the schedule and is reallocated. After the last epoch, or from the fraction `schedule_end`
    of the training on, it is exactly `b_T = (1 − target_sparsity)·(all adapted weights)`.

    Usually one call suffices, in any training loop:

        allocator = BudgetAllocator(model, total_epochs=10, steps_per_epoch=len(loader))
        allocator.attach(optimizer)

    From then on `optimizer.step()` does the rest, and `optimizer.state_dict()` carries the allocator's state, so that a
    checkpoint of the optimizer is a checkpoint of the allocator. Without `attach`, call `update_and_allocate` yourself
    between `loss.backward()` and `optimizer.step()`.

    Args:
        model: Model with SNELLA layers, wrapped by PEFT, DDP, `torch.compile` or not.
        total_epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps (not batches, where gradients are accumulated) of one epoch.
        total_steps: Optimizer steps of the whole training, where it stops within an epoch; the last one always brings
            the target budget.
        adapter_name: The adapter to train, default the first active one.

    Attributes:
        history: One entry an allocation: `step`, `t` and `total` (the schedule's time), `budget`, and for every matrix
            `budgets` and `importance`. The first entry is the start. Where allocations are frequent, only the last one
            of each epoch and of each hundredth of the training stays, so that checkpoints do not grow with every step.

    Raises:
        ValueError: The model has no such adapter, or a number of epochs or steps is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_epochs: int,
        steps_per_epoch: int,
        total_steps: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        total_steps = total_epochs * steps_per_epoch if total_steps is None else total_steps
        for name, value in (
            ("total_epochs", total_epochs),
            ("steps_per_epoch", steps_per_epoch),
            ("total_steps", total_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.matrices: list[AdaptedMatrix] = adapted_matrices(model, adapter_name)
        first = self.matrices[0]
        self.adapter_name = first.adapter_name
        self.config = first.layer.snella_config[self.adapter_name]
        self.total_epochs, self.steps_per_epoch, self.total_steps = total_epochs, steps_per_epoch, total_steps
        self.importance = ImportanceTracker(
            self.matrices,
            metric=self.config.importance,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            zero_init_ema=bool(self.config.zero_init_ema),
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._has_checked = False
        self._has_read = self._has_stepped = False  # in this step, and since the gradients were cleared
        self._is_stepping = False
        self._reads = 0  # of steps whose gradients were looked for
        self._untouched = {matrix.name for matrix in self.matrices}
        self.has_exact_steps = False  # whether the number of steps is a trainer's own
        self._handles: list[torch.utils.hooks.RemovableHandle | _ZeroGradHook] = []
        self._allocate(0)

    # what it works towards -----------------------------------------------------------------------------------------

    @property
    def total_weights(self) -> int:
        """All adapted weights."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def start_budget(self) -> int:
        """`b_0`, all adapted weights but `init_sparsity` of them."""
        return self.total_weights - round(self.config.init_sparsity * self.total_weights)

    @property
    def target_budget(self) -> int:
        """`b_T`."""
        return self.total_weights - round(self.config.target_sparsity * self.total_weights)

    @property
    def budgets(self) -> dict[str, int]:
        """Entries that each matrix may keep now, by the name of the matrix."""
        return {matrix.name: matrix.budget for matrix in self.matrices}

    @property
    def frozen(self) -> list[str]:
        """Matrices without budget. They get no gradient, so that nothing but `min_layer_share` brings them back."""
        return [matrix.name for matrix in self.matrices if matrix.is_frozen]

    @property
    def has_reached_target(self) -> bool:
        """Whether the budget is down to its target, as it stays from there on."""
        return self.history[-1]["budget"] == self.target_budget

    def is_realloc_step(self, step: int) -> bool:
        """Whether the budget is reallocated after optimizer step `step`, counted from 1."""
        every = self.config.realloc_every
        interval = self.steps_per_epoch if every == "epoch" else int(every)
        return step <= self.total_steps and (step % interval == 0 or step == self.total_steps)

    def _time(self, step: int) -> tuple[int, int]:
        """`(t, T)` of the schedule after `step` steps: in epochs where it is due every epoch, else in steps."""
        is_over = step >= self.total_steps
        if self.config.realloc_every == "epoch":
            total = math.ceil((self.config.schedule_end or 1.0) * self.total_epochs)
            return total if is_over else step // self.steps_per_epoch, total
        return step, math.ceil((self.config.schedule_end or 1.0) * self.total_steps)

    # in a training loop --------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> Self:
        """Follow an optimizer: from now on its steps drive the allocator and its state carries the allocator's.

        The importance is read before the optimizer changes the parameters (after, with `preset="official"`), in
        `optimizer.step(closure)` after the closure's first call; the budget changes after the step. A step that a
        gradient scaler skips counts once `optimizer.zero_grad()` clears its overflowed gradients. Attaching after
        `optimizer.load_state_dict` restores the allocator just as attaching before does.

        Args:
            optimizer: Any optimizer, wrapped by Accelerate or not.

        Returns:
            The allocator.

        Raises:
            RuntimeError: It is attached already.
            ValueError: The optimizer has none of the adapter's factors, so that its steps say nothing about them.
            NotImplementedError: It is DeepSpeed's, which keeps the gradients to itself.
        """
        if self._handles:
            raise RuntimeError("the allocator is attached to an optimizer already; call detach() first")
        _refuse_deepspeed(optimizer)
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if not self._is_optimized_by(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} holds none of the factors of adapter {self.adapter_name!r}; attach to the "
                "optimizer that trains them, made after the adapter, e.g. with create_snella_optimizer(model, lr=…); "
                "FSDP1 keeps them with use_orig_params=True"
            )
        if self.config.match_update and not hasattr(optimizer, MATCHER_ATTRIBUTE):
            warnings.warn(
                f"match_update=True has no effect on this {type(optimizer).__name__}; make the optimizer with "
                "create_snella_optimizer(model, lr=…)",
                stacklevel=2,
            )
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save_into),
            optimizer.register_load_state_dict_post_hook(self._load_from),
            _ZeroGradHook(optimizer, self._before_zero_grad),
        ]
        self._watch(attached=True)
        self._load_from(optimizer)
        self._has_checked = False
        return self

    def _is_optimized_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds factors of the adapter."""
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return any(id(factor) in optimized for factor in self._factors())

    def _factors(self) -> list[torch.Tensor]:
        """The first factor of every matrix, as the optimizer sees it."""
        return [matrix.layer.snella_A[self.adapter_name] for matrix in self.matrices]

    def detach(self) -> None:
        """Release the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._watch(attached=False)

    def update_and_allocate(self, step: int) -> None:
        """Update the importance and, if it is due, the budgets. For loops that do not `attach`.

        Call it once an optimizer step, between `loss.backward()` and `optimizer.step()` (after it with
        `preset="official"`), and before the gradients are cleared.

        Args:
            step: Number of this optimizer step, counted from 1.
        """
        self._watch(attached=True)
        self._update_importance()
        self._finish_step(step)

    def advance_to(self, step: int) -> None:
        """Count steps that the optimizer never took, up to `step`, so that the budget still ends at its target.

        For loops that skip steps and clear gradients without `optimizer.zero_grad()`. `SnellaCallback` calls this.
        """
        while self.step < step:
            self._finish_step(self.step + 1)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._has_checked and not self._is_optimized_by(optimizer):
            raise NotImplementedError(
                f"since the allocator was attached, the {type(optimizer).__name__} was given other parameters than the "
                f"factors of adapter {self.adapter_name!r}, as deepspeed.initialize does, which takes their gradients "
                "away; train with DDP or FSDP, or without an allocator (target_sparsity = init_sparsity)"
            )
        self._has_checked = True
        self._has_read = False
        self._is_stepping = True
        if self.config.zero_init_ema:
            return None
        positional, closure = len(args) > 1, kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._read_importance(optimizer)
            return None
        closure = self._reading(closure, optimizer)
        return ((args[0], closure, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": closure})

    def _reading(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Wrap a step's closure: the importance is read after its first call, which computes the gradients."""

        def closure_and_read() -> Any:
            loss = closure()
            self._read_importance(optimizer)
            return loss

        return closure_and_read

    def _read_importance(self, optimizer: Optimizer) -> None:
        """Update the importance unless this step already has."""
        if not self._has_read:
            self._has_read = True
            self._update_importance(_gradient_scale(optimizer))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._read_importance(optimizer)
        self._has_stepped, self._is_stepping = True, False
        self._finish_step(self.step + 1)

    def _before_zero_grad(self, optimizer: Optimizer) -> None:
        """Count a step that a gradient scaler skipped: no step since the last call, and gradients that overflowed."""
        if self._is_stepping:  # by the closure
            return
        has_stepped, self._has_stepped = self._has_stepped, False
        if has_stepped or any(is_sharded(factor) for factor in self._factors()):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()):
            self.advance_to(self.step + 1)

    def _watch(self, *, attached: bool) -> None:
        """Tell the layers that somebody takes care of their budgets."""
        self.config.watch.is_attached = attached

    def _update_importance(self, gradient_scale: float = 1.0) -> None:
        self.importance.update(gradient_scale)
        if self._untouched and self._reads < _GRADIENT_STEPS:
            self._look_for_gradients()

    def _look_for_gradients(self) -> None:
        """After the first steps, name the matrices that got no gradient in any of them."""
        self._reads += 1
        # `SnellaModel` names those that the model never used; a matrix without budget has no gradient
        seen = {m.name for m in self.matrices if m.is_frozen or not m.layer.is_applied}
        self._untouched -= self.importance.with_gradient() | seen
        if self._reads == min(_GRADIENT_STEPS, self.total_steps) and self._untouched:
            names = [matrix.name for matrix in self.matrices if matrix.name in self._untouched]
            warnings.warn(
                f"{len(names)} of {len(self.matrices)} adapted matrices got no gradient in the first {self._reads} "
                f"steps: {listed(map(repr, names))}; the loss does not depend on these layers; leave them out with "
                "exclude_modules",
                stacklevel=3,
            )

    def _finish_step(self, step: int) -> None:
        self.step = step
        self.config.watch.steps = None if self.has_exact_steps else (step, self.total_steps, self.steps_per_epoch)
        if self.is_realloc_step(step):
            self._allocate(step)

    def _allocate(self, step: int) -> None:
        """Allocate the budget of the time after `step` steps and write it into the layers."""
        t, total = self._time(step)
        budget = budget_at(t, total, self.start_budget, self.target_budget, self.config.schedule)
        caps = [matrix.size for matrix in self.matrices]
        scores = _same_on_every_rank(self.importance.scores())
        # before the first step nothing is known of any matrix: size decides, as it always does with "uniform"
        by_size = self.config.allocation == "uniform" or step == 0
        shares = [matrix.budget for matrix in self.matrices]
        if step > 0 or sum(shares) != budget:  # those of an adapter that was trained to this budget stay
            shares = allocate(
                [float(cap) for cap in caps] if by_size else scores, caps, budget, self.config.min_layer_share
            )
        self._set_budgets(shares)
        names = [matrix.name for matrix in self.matrices]
        if self.history and not self._is_lasting(self.history[-1]["step"], step):
            self.history.pop()
        self.history.append(
            {
                "step": step,
                "t": t,
                "total": total,
                "budget": budget,
                "budgets": dict(zip(names, shares, strict=True)),
                "importance": dict(zip(names, scores, strict=True)),
            }
        )

    def _is_lasting(self, step: int, following: int) -> bool:
        """Whether the entry of `step` stays in the history once that of `following` comes."""

        def period(k: int) -> tuple[int, int]:
            return (k - 1) // self.steps_per_epoch, (k - 1) * _HISTORY_PARTS // self.total_steps

        return step == 0 or period(step) != period(following)

    def _set_budgets(self, shares: list[int]) -> None:
        """Write one budget a matrix into the layers."""
        by_layer: dict[int, list[int]] = {}
        for matrix, share in zip(self.matrices, shares, strict=True):
            by_layer.setdefault(id(matrix.layer), []).append(share)
        for matrix in self.matrices:
            if matrix.group == 0:
                matrix.layer.set_budget(self.adapter_name, by_layer[id(matrix.layer)])

    # state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs: tensors and plain values only."""
        return {
            "format": _FORMAT,
            "step": self.step,
            "budgets": self.budgets,
            "importance": self.importance.state_dict(),
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the same budgets, averages and history.

        Raises:
            ValueError: The state is of another format or of other matrices.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"the allocator's state must have format {_FORMAT}, got {state.get('format')!r}")
        names = [matrix.name for matrix in self.matrices]
        if list(state["budgets"]) != names:
            different = sorted(set(state["budgets"]).symmetric_difference(names))[:3] or names[:3]
            raise ValueError(
                f"the allocator's state is of other matrices than this model adapts, e.g. {different}; "
                "load it into a model with the same target_modules"
            )
        self.importance.load_state_dict(state["importance"])
        self.step = state["step"]
        if self.step > 0:
            self._untouched = set()
        self.history = [dict(entry) for entry in state["history"]]
        self._set_budgets([int(value) for value in state["budgets"].values()])

    def _save_into(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][_STATE_KEY] = self.state_dict()

    def _load_from(self, optimizer: Optimizer) -> None:
        state = optimizer.param_groups[0].pop(_STATE_KEY, None)
        if state is not None:
            self.load_state_dict(state)


class _ZeroGradHook:
    """Calls a function before `optimizer.zero_grad()`, for which torch has no hook."""

    def __init__(self, optimizer: Optimizer, function: Callable[[Optimizer], None]) -> None:
        self.optimizer, self.function, self.zero_grad = optimizer, function, optimizer.zero_grad
        # Accelerate asks for the signature; the attributes may be those of another such hook
        functools.update_wrapper(self, optimizer.zero_grad, updated=())
        optimizer.zero_grad = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.function(self.optimizer)
        self.zero_grad(*args, **kwargs)

    def remove(self) -> None:
        """Stop; where others have wrapped it since, it stays and only passes on."""
        self.function = lambda _: None
        if self.optimizer.__dict__.get("zero_grad") is self:
            del self.optimizer.zero_grad


def _refuse_deepspeed(optimizer: Any) -> None:
    """Refuse an optimizer of DeepSpeed, wrapped by Accelerate or not: no gradient is where autograd would leave it."""
    inner = optimizer
    while inner is not None:
        if any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(inner).__mro__):
            raise NotImplementedError(
                f"BudgetAllocator cannot follow DeepSpeed's {type(inner).__name__}, which takes the gradients of the "
                "factors away; train with DDP or FSDP, or without an allocator (target_sparsity = init_sparsity)"
            )
        inner = getattr(inner, "optimizer", None)


def _gradient_scale(optimizer: Optimizer) -> float:
    """What a gradient scaler left for a fused optimizer to divide by; others get their gradients divided before."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _same_on_every_rank(scores: list[float]) -> list[float]:
    """The scores of rank 0 on every rank; gradients are averaged already, so that this only settles rounding."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return scores
    values = torch.tensor(scores, dtype=torch.float64)
    if distributed.get_backend() == "nccl":
        values = values.cuda()
    distributed.broadcast(values, src=0)
    return values.tolist()

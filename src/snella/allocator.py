"""Budget allocator: reduces the global budget during training and allocates it among matrices by importance.

The budget of a matrix is the maximum number of nonzero entries of its sparse update, which is computed from two trained
factors. The global budget is the sum over all adapted matrices. A matrix with budget 0 is frozen, because the
gradient of its factors is zero.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from snella._utils import listed
from snella.allocation import allocate, budget_at, schedule_length
from snella.config import SnellaConfig
from snella.importance import ImportanceTracker
from snella.matrices import AdaptedMatrix, adapted_matrices
from snella.optimizer import MATCHER_ATTRIBUTE, store_in_state, unwrap

_STATE_KEY = "snella_allocator"  # in the first parameter group of an optimizer's state
_FORMAT = 2  # of the allocator's state
_HISTORY_INTERVALS = 100  # equal parts of training; the history keeps the last entry of each
_OPTIMIZER_HOOKS = (
    *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    *("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_post_hooks"),
)
_SETTINGS = (
    *("target_sparsity", "init_sparsity", "schedule", "schedule_end", "allocation", "min_layer_share", "realloc_every"),
    *("importance", "beta1", "beta2", "zero_init_ema"),
)
"""Settings of the adapter that apply to the whole allocation."""
_GRADIENT_CHECK_STEPS = 5  # a zero-initialized head or drop-path can suppress the first gradients

__all__ = ["BudgetAllocator", "allocate"]


class BudgetAllocator:
    """Layer-level competition of SNELLA (section 3.3, Algorithm 1 of arXiv 2510.24037).

    Every optimizer step updates the importance of every matrix. Every epoch, or every N steps (`realloc_every`), the
    global budget is set according to the schedule and reallocated. After the last epoch, or after the fraction
    `schedule_end` of training, it equals `b_T = (1 − target_sparsity)·total_weights`, rounded to an integer. Creating
    the allocator sets the initial budget and allocates it by size; budgets of the adapter that already have this sum
    are kept.

    Most training loops need only one call to `attach`:

        allocator = BudgetAllocator(model, total_epochs=10, steps_per_epoch=len(loader))
        allocator.attach(optimizer)

    `optimizer.step()` then drives the allocator, and `optimizer.state_dict()` includes the allocator's state. Without
    `attach`, call `update_and_allocate` between `loss.backward()` and `optimizer.step()`.

    Args:
        model: Model with SNELLA layers, possibly wrapped by PEFT, DDP, or `torch.compile`.
        total_epochs: Number of training epochs.
        steps_per_epoch: Optimizer steps per epoch, not batches. With gradient accumulation, several batches are one
            step.
        total_steps: Total number of optimizer steps; defaults to `total_epochs * steps_per_epoch`. Set it if training
            stops within an epoch. After the last step, the budget always has its target value.
        adapter_name: Adapter to train; defaults to the first active one.

    Attributes:
        history: One dict per allocation, with the `step`, the time `t` and end `total` of the schedule (in epochs or
            steps), the global `budget`, and the `budgets` and `importance` of each matrix. The first entry is the
            initial allocation. If allocations are frequent, only the last entry of each epoch and of each hundredth of
            training is kept, to limit the size of checkpoints.

    Raises:
        ValueError: If the model does not have this adapter, an epoch or step count is not an integer of at least 1, or
            `model` contains several PEFT models with different settings of the budget.
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
        counts = {"total_epochs": total_epochs, "steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        for name, value in counts.items():
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        total_steps = total_epochs * steps_per_epoch if total_steps is None else total_steps
        self.matrices: list[AdaptedMatrix] = adapted_matrices(model, adapter_name)
        first_matrix = self.matrices[0]
        self.adapter_name = first_matrix.adapter_name
        self.config = first_matrix.layer.snella_config[self.adapter_name]
        configs = [matrix.layer.snella_config[self.adapter_name] for matrix in self.matrices]
        _check_equal_settings(configs)
        self._watches = {config.watch for config in configs}  # one per PEFT model
        self.total_epochs = total_epochs
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.importance = ImportanceTracker(
            self.matrices,
            metric=self.config.importance,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            zero_init_ema=bool(self.config.zero_init_ema),
        )
        self.step = 0
        self._state_key = _STATE_KEY
        self.history: list[dict[str, Any]] = []
        self._has_checked_optimizer = False
        self._has_updated_importance = False  # in the current step
        self._has_stepped = False  # since the last call of `zero_grad`
        self._is_stepping = False  # True during a call of `optimizer.step`
        self._num_gradient_checks = 0  # steps checked for missing gradients
        self._without_gradient = {matrix.name for matrix in self.matrices}  # in all checked steps
        self.has_exact_steps = False  # True if a trainer provides the exact step count
        self._handles: list[RemovableHandle | _ZeroGradHook] = []
        self._allocate(0)

    # budgets -------------------------------------------------------------------------------------------------------

    @property
    def total_weights(self) -> int:
        """Number of adapted weights."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def target_budget(self) -> int:
        """Final global budget, `b_T = (1 − target_sparsity)·total_weights`, rounded to an integer."""
        return self.total_weights - round(self.config.target_sparsity * self.total_weights)

    @property
    def budgets(self) -> dict[str, int]:
        """Current budget of each matrix, by matrix name."""
        return {matrix.name: matrix.budget for matrix in self.matrices}

    @property
    def frozen(self) -> list[str]:
        """Names of the matrices with budget 0. Without gradients, their sensitivity decays to 0."""
        return [matrix.name for matrix in self.matrices if matrix.is_frozen]

    @property
    def has_reached_target(self) -> bool:
        """True if the budget has reached its final value."""
        return self.history[-1]["budget"] == self.target_budget

    # training loop -------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> Self:
        """Attach to an optimizer: its steps drive the allocator, and its state dict includes the allocator's state.

        The importance is updated before the optimizer changes the parameters; in `optimizer.step(closure)`, this is
        after the closure's first call. With `zero_init_ema=True`, it is updated after the step instead. The budget
        changes after the step. A step that a gradient scaler skips is counted when `optimizer.zero_grad()` clears the
        overflowed gradients. If FSDP shards the factors, call `advance_to` for skipped steps instead. `attach` may be
        called before or after `optimizer.load_state_dict`. Another allocator of the same adapter is detached from the
        optimizer. If allocators of several models with equal adapter names share an optimizer, a resumed program must
        attach them in the same order.

        Args:
            optimizer: Any optimizer, possibly wrapped by Accelerate.

        Returns:
            The allocator.

        Raises:
            RuntimeError: If the allocator is already attached.
            ValueError: If the optimizer contains none of the adapter's factors, or has loaded an allocator state that
                does not match (see `load_state_dict`).
            NotImplementedError: If the optimizer is DeepSpeed's, which hides the gradients.
            TypeError: If the optimizer wraps another one and lacks hooks of its own, as timm's `Lookahead`.
        """
        if self._handles:
            raise RuntimeError("the allocator is already attached to an optimizer; call detach() first")
        _reject_deepspeed(optimizer)
        optimizer = unwrap(optimizer)
        if not all(hasattr(optimizer, hooks) for hooks in _OPTIMIZER_HOOKS):
            raise TypeError(
                f"{type(optimizer).__name__} lacks hooks of torch's optimizers; attach to the optimizer that it wraps"
            )
        if not self._is_optimized_by(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} has none of the factors of adapter {self.adapter_name!r}; create the "
                "optimizer after the adapter, e.g. with create_snella_optimizer(model, lr=…), and attach to it; "
                "with FSDP1, set use_orig_params=True"
            )
        if self.config.match_update and not hasattr(optimizer, MATCHER_ATTRIBUTE):
            warnings.warn(
                f"match_update=True has no effect on this {type(optimizer).__name__}; create the optimizer with "
                "create_snella_optimizer(model, lr=…)",
                stacklevel=2,
            )
        taken: set[str] = set()
        for hook in list(optimizer._optimizer_step_pre_hooks.values()):
            other = getattr(hook, "__self__", None)
            if not isinstance(other, BudgetAllocator):
                continue
            if other._layers_of_adapter == self._layers_of_adapter:
                other.detach()
            else:
                taken.add(other._state_key)
        self._state_key = self._choose_state_key(taken)
        self._handles = [
            *store_in_state(optimizer, self._state_key, self._packed_state, self._load_packed_state),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            _ZeroGradHook(optimizer, self._before_zero_grad),
        ]
        self._set_attached(True)
        self._has_checked_optimizer = False
        return self

    def _choose_state_key(self, taken: Container[str]) -> str:
        """Return the entry of the optimizer's state dict for this allocator.

        The default adapter's key has no suffix. Allocators of several models are numbered in the order in which they
        are attached.
        """
        first = _STATE_KEY if self.adapter_name == "default" else f"{_STATE_KEY}_{self.adapter_name}"
        keys = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
        return next(key for key in keys if key not in taken)

    def _set_attached(self, is_attached: bool) -> None:
        """Tell the watches, which warn if no allocator is attached, whether this allocator sets the budgets."""
        for watch in self._watches:
            if is_attached:
                watch.allocators.add(self)
            else:
                watch.allocators.discard(self)

    @property
    def _layers_of_adapter(self) -> tuple[str, frozenset[int]]:
        """Name of the adapter and ids of its layers."""
        return self.adapter_name, frozenset(id(matrix.layer) for matrix in self.matrices)

    def _is_optimized_by(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer updates any of the adapter's factors."""
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = [matrix.layer for matrix in self.matrices]
        factors = (values[self.adapter_name] for layer in layers for values in (layer.snella_A, layer.snella_B))
        return any(id(factor) in optimized for factor in factors)

    def detach(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._set_attached(False)

    def update_and_allocate(self, step: int) -> None:
        """Update the importance, and reallocate the budget if due, in training loops without `attach`.

        Call it once per optimizer step, between `loss.backward()` and `optimizer.step()`. With `zero_init_ema=True`,
        call it after `optimizer.step()` instead, before clearing the gradients.

        Args:
            step: 1-based index of this optimizer step.
        """
        self._set_attached(True)
        self._update_importance()
        self._finish_step(step)

    def advance_to(self, step: int) -> None:
        """Count skipped steps up to `step`, so that the budget reaches its target.

        Call it if steps may be skipped and either FSDP shards the factors or the training loop clears gradients without
        `optimizer.zero_grad()`. `SnellaCallback` calls it after every step.
        """
        while self.step < step:
            self._finish_step(self.step + 1)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Update the importance, or wrap the step's closure to do so after its first call.

        Returns the arguments with the wrapped closure, or `None` to keep the arguments.
        """
        if not self._has_checked_optimizer and not self._is_optimized_by(optimizer):
            raise NotImplementedError(
                f"the parameters of {type(optimizer).__name__} were replaced after attach (e.g. by "
                f"deepspeed.initialize) and no longer include the factors of adapter {self.adapter_name!r}, whose "
                "gradients are unavailable; train with DDP or FSDP, or without an allocator "
                "(target_sparsity = init_sparsity)"
            )
        self._has_checked_optimizer = True
        self._has_updated_importance = False
        self._is_stepping = True
        if self.config.zero_init_ema:
            return None
        # `args` starts with the optimizer itself
        is_positional = len(args) > 1
        positional_closure = args[1] if is_positional else None
        closure = kwargs.get("closure", positional_closure)
        if closure is None:
            self._update_importance_once(optimizer)
            return None

        def wrapped_closure() -> Any:
            loss = closure()  # computes the gradients
            self._update_importance_once(optimizer)
            return loss

        if is_positional:
            return (args[0], wrapped_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped_closure}

    def _update_importance_once(self, optimizer: Optimizer, *, has_stepped: bool = False) -> None:
        """Update the importance once per step: before the parameters change or, if `has_stepped`, afterwards."""
        if not self._has_updated_importance:
            self._has_updated_importance = True
            # a fused optimizer divides the gradients by the gradient scaler's scale in its step, unless they overflowed
            scale = getattr(optimizer, "grad_scale", None)
            if has_stepped and not getattr(optimizer, "found_inf", 0):
                scale = None
            self._update_importance(1.0 if scale is None else float(scale))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Update the importance unless `_before_step` or the closure has done so, and count the step."""
        self._update_importance_once(optimizer, has_stepped=True)
        self._has_stepped = True
        self._is_stepping = False
        self._finish_step(self.step + 1)

    def _before_zero_grad(self, optimizer: Optimizer) -> None:
        """Count a skipped step if gradients overflowed and no step has run since the last call.

        If FSDP shards the factors, the training loop must call `advance_to` instead.
        """
        if self._is_stepping:  # called by the closure
            return
        has_stepped = self._has_stepped
        self._has_stepped = False
        if has_stepped or self.importance.has_sharded_factors():
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not bool(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()):
            self.advance_to(self.step + 1)

    def _update_importance(self, gradient_scale: float = 1.0) -> None:
        """Update the importance, and warn about matrices that have no gradient in any of the first steps."""
        self.importance.update(gradient_scale)
        if not self._without_gradient or self._num_gradient_checks == _GRADIENT_CHECK_STEPS:
            return
        self._num_gradient_checks += 1
        # `TrainingWatch` reports layers that the model does not use
        excluded = {matrix.name for matrix in self.matrices if not matrix.layer.is_applied}
        if self._num_gradient_checks == 1:  # later, a zero budget may result from a missing gradient
            excluded |= set(self.frozen)
        self._without_gradient -= self.importance.names_with_gradient() | excluded
        if self._num_gradient_checks == min(_GRADIENT_CHECK_STEPS, self.total_steps) and self._without_gradient:
            matrices = [matrix for matrix in self.matrices if matrix.name in self._without_gradient]
            names = listed(repr(matrix.name) for matrix in matrices)
            warnings.warn(
                f"{len(matrices)} of {len(self.matrices)} adapted matrices got no gradient in the first "
                f"{self._num_gradient_checks} steps: {names}; {self._gradient_remedy(matrices)}",
                stacklevel=3,
            )

    def _gradient_remedy(self, matrices: list[AdaptedMatrix]) -> str:
        """Return the probable reason why these matrices get no gradient, with a remedy."""
        name = self.adapter_name
        layers = [matrix.layer for matrix in matrices]
        if all(name in layer.merged_adapters for layer in layers):
            return "the adapter is merged; call unmerge_adapter() before training"
        if not any(name in layer.active_adapters for layer in layers):
            return f"the adapter is not active; call set_adapter({name!r})"
        if not any(layer.snella_A[name].requires_grad for layer in layers):
            return "the factors are frozen; load the adapter with is_trainable=True"
        if len(matrices) == len(self.matrices) and len(matrices) > 1:
            if all(layer.snella_A[name].grad is None for layer in layers):
                return (
                    "their gradients are None: the loss does not depend on them, they are cleared before the step, or "
                    "reentrant gradient checkpointing drops them (set use_reentrant=False)"
                )
            return "the initial update may saturate the model; lower scaling"
        return "the loss does not depend on these layers; exclude them with exclude_modules"

    def _finish_step(self, step: int) -> None:
        """Count a step, and reallocate the budget if due."""
        self.step = step
        for watch in self._watches:
            watch.steps = None if self.has_exact_steps else (step, self.total_steps, self.steps_per_epoch)
        interval = self.steps_per_epoch if self.config.realloc_every == "epoch" else int(self.config.realloc_every)
        if step == self.total_steps or (step < self.total_steps and step % interval == 0):
            self._allocate(step)

    def _allocate(self, step: int) -> None:
        """Allocate the budget after `step` steps and write it into the layers."""
        # current time and end of the schedule, both in epochs or both in steps
        t = step
        end = self.total_steps
        if self.config.realloc_every == "epoch":
            end = self.total_epochs
            t = self.total_epochs if step >= self.total_steps else step // self.steps_per_epoch
        end = schedule_length(end, self.config.schedule_end)
        start_budget = self.total_weights - round(self.config.init_sparsity * self.total_weights)
        total_budget = budget_at(t, end, start_budget, self.target_budget, self.config.schedule)
        sizes = [matrix.size for matrix in self.matrices]
        scores = self.importance.scores()
        # before the first step, no importance is known
        is_by_size = self.config.allocation == "uniform" or step == 0
        budgets = [matrix.budget for matrix in self.matrices]
        if step > 0 or sum(budgets) != total_budget:  # an adapter that already has this budget keeps its allocation
            importance: Sequence[float] = sizes if is_by_size else scores
            budgets = allocate(importance, sizes, total_budget, self.config.min_layer_share)
        self._set_budgets(budgets)
        names = [matrix.name for matrix in self.matrices]
        if self.history and (previous_step := self.history[-1]["step"]) > 0:
            # keep the last entry of each epoch and of each interval
            epochs = [(k - 1) // self.steps_per_epoch for k in (previous_step, step)]
            intervals = [(k - 1) * _HISTORY_INTERVALS // self.total_steps for k in (previous_step, step)]
            if epochs[0] == epochs[1] and intervals[0] == intervals[1]:
                self.history.pop()
        self.history.append(
            {
                "step": step,
                "t": t,
                "total": end,
                "budget": total_budget,
                "budgets": dict(zip(names, budgets, strict=True)),
                "importance": dict(zip(names, scores, strict=True)),
            }
        )

    def _set_budgets(self, budgets: list[int]) -> None:
        """Write the budgets, one per matrix, into the layers."""
        budgets_by_layer: dict[int, list[int]] = {}
        for matrix, budget in zip(self.matrices, budgets, strict=True):
            budgets_by_layer.setdefault(id(matrix.layer), []).append(budget)
        for matrix in self.matrices:
            if matrix.group == 0:  # once per layer
                matrix.layer.set_budget(self.adapter_name, budgets_by_layer[id(matrix.layer)])

    # state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and plain values.

        If FSDP shards the factors, call this method and `optimizer.state_dict()` in every process.
        """
        return {
            "format": _FORMAT,
            "step": self.step,
            "budgets": self.budgets,
            "importance": self.importance.state_dict(),
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the budgets, importance averages, step, and history from a `state_dict`.

        Raises:
            ValueError: If the format, matrices, rank, or importance metric of the state do not match.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"the allocator's state must have format {_FORMAT}, got {state.get('format')!r}")
        names = [matrix.name for matrix in self.matrices]
        if list(state["budgets"]) != names:
            # if all names agree, their order differs
            mismatched = sorted(set(state["budgets"]).symmetric_difference(names))[:3] or names[:3]
            raise ValueError(
                f"the allocator's state and this model have different matrices, e.g. {mismatched}; "
                "load it into a model with the same target_modules"
            )
        self.importance.load_state_dict(state["importance"])
        self.step = state["step"]
        if self.step > 0:  # only the first steps are checked for missing gradients
            self._without_gradient = set()
        self.history = [dict(entry) for entry in state["history"]]
        self._set_budgets([int(value) for value in state["budgets"].values()])

    def _packed_state(self) -> dict[str, Any]:
        """Return the state with the history as a JSON string.

        torch.distributed.checkpoint rejects a list whose length differs from that of the list in the current state.
        """
        state = self.state_dict()
        return {**state, "history": json.dumps(state["history"])}

    def _load_packed_state(self, state: dict[str, Any]) -> None:
        """Load the result of `_packed_state`; `load_state_dict` rejects other formats."""
        if state.get("format") == _FORMAT:
            state = {**state, "history": json.loads(state["history"])}
        self.load_state_dict(state)


class _ZeroGradHook:
    """Hook that runs before `optimizer.zero_grad()`, for which torch has no API."""

    def __init__(self, optimizer: Optimizer, callback: Callable[[Optimizer], None]) -> None:
        self.optimizer = optimizer
        self.callback = callback
        self.zero_grad = optimizer.zero_grad
        self.previous = optimizer.__dict__.get("zero_grad")  # e.g. the hook of another allocator
        # Accelerate inspects the signature; `updated=()` because the attributes of another hook must not be copied
        functools.update_wrapper(self, optimizer.zero_grad, updated=())
        optimizer.zero_grad = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.callback(self.optimizer)
        self.zero_grad(*args, **kwargs)

    def remove(self) -> None:
        """Remove the hook. If another wrapper encloses it, the hook remains but only forwards calls."""
        self.callback = lambda _: None
        attributes = self.optimizer.__dict__
        if attributes.get("zero_grad") is self:
            del attributes["zero_grad"]
            if self.previous is not None:
                attributes["zero_grad"] = self.previous


def _check_equal_settings(configs: Iterable[SnellaConfig]) -> None:
    """Raise `ValueError` if the configurations of several PEFT models differ in a setting of the allocation."""
    distinct = list({id(config): config for config in configs}.values())
    for name in _SETTINGS:
        values = list(dict.fromkeys(getattr(config, name) for config in distinct))
        if len(values) > 1:
            raise ValueError(
                f"{name} must be the same in all PEFT models of an allocator, got {' and '.join(map(repr, values))}; "
                "create one allocator for each PEFT model"
            )


def _reject_deepspeed(optimizer: Any) -> None:
    """Reject DeepSpeed optimizers, even inside Accelerate's wrapper, because they keep no gradients in `.grad`."""
    inner = optimizer
    while inner is not None:
        if any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(inner).__mro__):
            raise NotImplementedError(
                f"BudgetAllocator does not support DeepSpeed's {type(inner).__name__}, which hides the gradients of "
                "the factors; train with DDP or FSDP, or without an allocator (target_sparsity = init_sparsity)"
            )
        inner = getattr(inner, "optimizer", None)

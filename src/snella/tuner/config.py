"""Settings of one SNELLA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

from peft import PeftConfig

from snella.ops.backends import resolve_implementation
from snella.ops.kernels import KERNELS
from snella.ops.sparsify import SparsifyMode
from snella.tuner.schedule import Schedule
from snella.tuner.watch import TrainingWatch

Preset = Literal["paper", "official", "matched"]
Allocation = Literal["competition", "uniform"]
ImportanceMetric = Literal["sensitivity", "magnitude", "delta_magnitude"]

MATCHED_KERNELS = ("mix_k", "p_linear")
"""Kernels whose steps `match_update` knows how to scale: sums of piecewise distances."""

_NO_UPDATE = "0.9 keeps a tenth of the update; to train nothing, remove the adapter (snella train --method linear)"

# what a preset decides where the user leaves a field at None
_PAPER: dict[str, Any] = {
    "sparsify_mode": "soft",
    "learn_piece_coeff": True,
    "learn_temperature": False,
    "update_dropout": 0.0,
    "update_drop_path": 0.0,
    "dropout_exclude": [],
    "train_tokens": [],
    "zero_start": False,
    "match_update": False,
    "schedule_end": 1.0,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "matched": {**_PAPER, "match_update": True, "schedule_end": 0.7},
    "official": {
        "sparsify_mode": "official",
        "learn_piece_coeff": False,
        "learn_temperature": True,
        "update_dropout": 0.1,
        "update_drop_path": 0.1,
        # the output projection of the attention, by the names that libraries use
        "dropout_exclude": ["proj", "out_proj", "o_proj", "to_out.0", "attn.c_proj", "attention.output.dense"],
        "train_tokens": ["cls_token"],
        "zero_start": True,
        "match_update": False,
        "schedule_end": 1.0,
    },
}


@dataclass
class SnellaConfig(PeftConfig):
    """Settings of one SNELLA adapter: which matrices, how they are merged, how many weights survive.

    Args:
        r: Rank of the two factors; `num_pieces` must divide it.
        kernel: Kernel function that merges the factors: `mix_k`, `p_linear` (SNELL), `normalized_rbf`, `rbf`,
            `sigmoid` or `linear` (LoRA's product).
        num_pieces: Pieces that each factor row is cut into.
        target_sparsity: Fraction of the adapted weights that is zero in the update once training ends, in `[0, 1)`.
        init_sparsity: The same when training starts, at most `target_sparsity`.
        target_modules: Modules to adapt: a list of names or suffixes, a regular expression, or `"all-linear"` (every
            linear layer of any model but the head, patch embedding and patch merging). `None` chooses by model: the
            attention projections of Stable Diffusion 3, the image encoder of SAM, else `"all-linear"`.
        exclude_modules: Modules to leave out, a list of names or suffixes or a regular expression.
        layers_to_transform: Block numbers to adapt, with `target_modules` as a list.
        layers_pattern: Name of the list of blocks, if it is not the first numbered one.
        qkv_groups: How fused query-key-value layers are cut into matrices that compete on their own. `"auto"` knows
            the names that timm and transformers use; an integer cuts those layers into that many equal matrices (1:
            not at all); a mapping from suffixes to an integer or a list of row counts decides layer by layer.
        modules_to_save: Modules that are trained in full and saved with the adapter, such as the classifier head.
        train_tokens: The same for bare parameters, such as `cls_token`, by name or suffix.
        scaling: Factor before the update.
        update_dropout: Dropout on the input of the update alone; takes two products instead of one.
        update_drop_path: Chance that a sample skips the update; takes two products instead of one.
        dropout_exclude: Suffixes of modules whose update sees no `update_dropout`.
        preset: `"paper"`; `"official"` for what the authors' released code does; or `"matched"`, the paper's update
            with steps that depend less on the learning rate (`match_update=True, schedule_end=0.7`). It decides the
            fields left at `None`.
        sparsify_mode: `"soft"` (eq. 13), `"official"`, or `"none"`: the update is the merged matrix itself, which is
            kernelised LoRA; needs `target_sparsity=0`.
        learn_piece_coeff: Whether the coefficients `α_p` are learned.
        learn_temperature: Whether the softmax has a learned temperature.
        zero_start: Whether the importance's moving averages start at zero and are read after the optimiser's step, as
            in the authors' code, instead of at the first value and before it.
        allocation: `"competition"` shares the budget out by importance, `"uniform"` by size (SNELL).
        schedule: How the budget shrinks: `cubic`, `quadratic`, `linear` or `constant`.
        match_update: Whether `create_snella_optimizer` scales the factors' steps so that each changes the update in
            proportion to the weight it is added to (see `StepMatcher`); for the kernels `mix_k` and `p_linear`.
        schedule_end: Fraction of the training after which the budget has reached its target, in `(0, 1]`; 1 is the
            paper. Below 1, the steps that are left train the sparsity that was asked for.
        importance: `sensitivity` (eq. 11), `magnitude` of the factors or `delta_magnitude` of the update.
        realloc_every: `"epoch"`, or a number of optimiser steps.
        beta1: Decay of the moving average of the importance.
        beta2: Decay of the moving average of its uncertainty.
        min_layer_share: Fraction of its uniform share that every matrix keeps; 0 is the paper.
        softmax_dim: 0 normalises each column of the merged matrix over its outputs, 1 each row over its inputs.
        center_softmax: Subtract the softmax's mean. Not in the paper.
        keep_delta: Keep the merged matrix for the backward pass instead of rebuilding it (numba rebuilds as fast as it
            would read, and keeps nothing), and in evaluation the effective weight
            of a layer whose base weight is quantised.
        fixed_support: Let `layer.set_support` say once which entries may change (the paper's predefined mask), instead
            of letting them compete: the update is then the merged matrix itself at these entries, unshrunk. Sparsities,
            schedule and allocation mean nothing then.
        impl: Implementation of the adapted layer: `"auto"`, `"triton"` (kernels on a CUDA device), `"numba"` (compiled
            loops on the CPU), `"eager"` or `"reference"`; see `snella.ops.adapted_product`.
        init_weights: `True` starts with factors so small that the update of a weight of ViT-B's size starts near 5e-6;
            `False` draws larger ones, for tests.

    Raises:
        ValueError: One error that lists every setting out of range.
    """

    r: int = field(default=8, metadata={"help": "rank of the two factors"})
    kernel: str = field(default="mix_k", metadata={"help": "kernel function that merges the factors"})
    num_pieces: int = field(default=2, metadata={"help": "pieces that each factor row is cut into"})
    target_sparsity: float = field(default=0.7, metadata={"help": "fraction of zeros in the final update"})
    init_sparsity: float = field(default=0.0, metadata={"help": "fraction of zeros in the first update"})
    target_modules: set[str] | list[str] | str | None = field(default=None, metadata={"help": "modules to adapt"})
    exclude_modules: set[str] | list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block numbers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    qkv_groups: int | str | dict[str, int | list[int]] = field(
        default="auto", metadata={"help": "how fused query-key-value layers are cut into matrices"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    train_tokens: list[str] | None = field(default=None, metadata={"help": "bare parameters trained in full"})
    scaling: float = field(default=1.0, metadata={"help": "factor before the update"})
    update_dropout: float | None = field(default=None, metadata={"help": "dropout on the update's input"})
    update_drop_path: float | None = field(default=None, metadata={"help": "chance that a sample skips the update"})
    dropout_exclude: list[str] | None = field(default=None, metadata={"help": "modules without update_dropout"})
    preset: str = field(default="paper", metadata={"help": "paper, official or matched"})
    sparsify_mode: str | None = field(default=None, metadata={"help": "soft, official or none"})
    learn_piece_coeff: bool | None = field(default=None, metadata={"help": "learn the piece coefficients"})
    learn_temperature: bool | None = field(default=None, metadata={"help": "learn the softmax temperature"})
    zero_start: bool | None = field(default=None, metadata={"help": "moving averages as in the authors' code"})
    allocation: str = field(default="competition", metadata={"help": "competition or uniform"})
    schedule: str = field(default="cubic", metadata={"help": "how the budget shrinks"})
    match_update: bool | None = field(default=None, metadata={"help": "match steps to the weights' size"})
    schedule_end: float | None = field(default=None, metadata={"help": "when the budget reaches its target"})
    importance: str = field(default="sensitivity", metadata={"help": "importance metric of the competition"})
    realloc_every: int | str = field(default="epoch", metadata={"help": "epoch, or a number of steps"})
    beta1: float = field(default=0.85, metadata={"help": "decay of the importance"})
    beta2: float = field(default=0.85, metadata={"help": "decay of its uncertainty"})
    min_layer_share: float = field(default=0.0, metadata={"help": "share of the uniform budget each matrix keeps"})
    softmax_dim: int = field(default=0, metadata={"help": "axis of the softmax, 0 or 1"})
    center_softmax: bool = field(default=False, metadata={"help": "subtract the softmax's mean"})
    keep_delta: bool = field(default=False, metadata={"help": "keep the merged matrix for the backward pass"})
    fixed_support: bool = field(default=False, metadata={"help": "change entries that are given, see set_support"})
    impl: str = field(default="auto", metadata={"help": "implementation of the adapted layer"})
    init_weights: bool = field(default=True, metadata={"help": "start next to the pre-trained model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # a plain string: PEFT's own enumeration has no such member, see snella._registration
        self.peft_type = "SNELLA"
        self.watch = TrainingWatch()
        self._apply_preset()
        faults = [*self._choice_faults(), *self._range_faults(), *self._target_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )

    def wanted_tokens(self) -> list[str]:
        """Names of the bare parameters to train: the user's, or the preset's whatever another model made of them."""
        return list((self.train_tokens if self.requires_tokens else _PRESETS[self.preset]["train_tokens"]) or [])

    def _apply_preset(self) -> None:
        """Fill what the user left at `None`."""
        # a preset's tokens may be absent from a model, the user's own may not
        self.requires_tokens = self.train_tokens is not None
        for name, value in _PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)

    def _choice_faults(self) -> list[str]:
        """Name every field whose value is not among its choices, with the nearest one."""
        choices = {
            "preset": get_args(Preset),
            "kernel": tuple(KERNELS),
            "sparsify_mode": get_args(SparsifyMode),
            "allocation": get_args(Allocation),
            "schedule": get_args(Schedule),
            "importance": get_args(ImportanceMetric),
        }
        faults = []
        for name, allowed in choices.items():
            value = getattr(self, name)
            # a wrong preset leaves its dependants at None: one fault, not seven
            if value not in allowed and not (value is None and self.preset not in _PRESETS):
                near = get_close_matches(str(value), allowed, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                faults.append(f"{name} must be one of {list(allowed)}, got {value!r}{hint}")
        try:
            resolve_implementation(self.impl)
        except ValueError as error:
            faults.append(str(error))
        return faults

    def _range_faults(self) -> list[str]:
        """Name every number out of range."""
        faults = self._kind_faults()
        if faults:
            return faults
        cuts_rows = self.kernel in KERNELS and "piece_coeff" in KERNELS[self.kernel].scalars
        faults += [
            f"{name} must be at least 1, got {name}={getattr(self, name)}"
            for name in ("r", "num_pieces")
            if getattr(self, name) < 1
        ]
        if not faults and cuts_rows and self.r % self.num_pieces:
            below = self.r // self.num_pieces * self.num_pieces
            near = " or ".join(f"r={rank}" for rank in (below, below + self.num_pieces) if rank > 0)
            faults.append(f"r must be divisible by num_pieces={self.num_pieces}, got r={self.r}; {near} would fit")
        if not 0 <= self.target_sparsity < 1:
            is_percent = 1 < self.target_sparsity < 100
            hint = f"did you mean {self.target_sparsity / 100:g}?" if is_percent else _NO_UPDATE
            faults.append(f"target_sparsity must be in [0, 1), got {self.target_sparsity}; {hint}")
        elif not 0 <= self.init_sparsity <= self.target_sparsity:
            faults.append(
                f"init_sparsity must be in [0, target_sparsity], got {self.init_sparsity} "
                f"with target_sparsity={self.target_sparsity}"
            )
        if self.sparsify_mode == "none" and self.target_sparsity != 0:
            faults.append(
                f"sparsify_mode='none' keeps every weight of the update: target_sparsity must be 0, got "
                f"{self.target_sparsity}"
            )
        if not math.isfinite(self.scaling) or self.scaling == 0:
            faults.append(f"scaling must be finite and not 0, got {self.scaling}")
        for name in ("beta1", "beta2", "update_dropout", "update_drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                faults.append(f"{name} must be in [0, 1), got {value}")
        if not 0 <= self.min_layer_share <= 1:
            faults.append(f"min_layer_share must be in [0, 1], got {self.min_layer_share}")
        if self.match_update and self.kernel not in MATCHED_KERNELS:
            faults.append(
                f"match_update=True needs a kernel of {list(MATCHED_KERNELS)}, got kernel={self.kernel!r}; "
                "set match_update=False"
            )
        if self.schedule_end is not None and not 0 < self.schedule_end <= 1:
            faults.append(f"schedule_end must be in (0, 1], got {self.schedule_end}; 1 shrinks the budget to the end")
        if self.softmax_dim not in (0, 1):
            faults.append(f"softmax_dim must be 0 or 1, got {self.softmax_dim}")
        every = self.realloc_every
        if every != "epoch" and not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
            faults.append(f"realloc_every must be 'epoch' or a number of steps of at least 1, got {every!r}")
        if self.fixed_support and (self.update_dropout or self.update_drop_path):
            faults.append(
                f"fixed_support=True needs update_dropout=0 and update_drop_path=0, got {self.update_dropout} and "
                f"{self.update_drop_path}"
            )
        groups = self.qkv_groups
        if not (groups == "auto" or isinstance(groups, dict) or (isinstance(groups, int) and groups >= 1)):
            faults.append(f"qkv_groups must be 'auto', a number of at least 1 or a mapping, got {groups!r}")
        return faults

    def _kind_faults(self) -> list[str]:
        """Name every field that must be a number and is not."""
        faults = [
            f"{name} must be a whole number, got {getattr(self, name)!r}"
            for name in ("r", "num_pieces", "softmax_dim")
            if not isinstance(getattr(self, name), int)
        ]
        numbers = ("target_sparsity", "init_sparsity", "scaling", "beta1", "beta2", "min_layer_share")
        for name in (*numbers, "update_dropout", "update_drop_path", "schedule_end"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and not (value is None and name not in numbers):
                faults.append(f"{name} must be a number, got {value!r}")
        return faults

    def _target_faults(self) -> list[str]:
        """Name what cannot be combined in the selection of modules."""
        faults = []
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                if self.target_modules.lower() == "all-linear":
                    continue
                faults.append(
                    f"{name} needs target_modules as a list, got target_modules={self.target_modules!r} "
                    f"and {name}={getattr(self, name)!r}; put the block numbers into the regular expression"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append(f"layers_pattern needs layers_to_transform, got layers_pattern={self.layers_pattern!r}")
        return faults

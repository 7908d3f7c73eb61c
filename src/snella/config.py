"""Configuration of a SNELLA adapter. Equation numbers and "the paper" refer to arXiv 2510.24037.

For each adapted weight, a kernel function merges two trained factors into a matrix, whose largest entries determine the
update. The budget is the maximum number of nonzero entries of all updates.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import regex
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from snella._utils import did_you_mean, has_suffix, longest_suffix
from snella.allocation import Schedule
from snella.backends import Implementation
from snella.kernels import Kernel, find_kernel, kernel_names, make_kernel
from snella.ops import parse_weight_gradient
from snella.sparsify import SparsifyMode
from snella.watch import TrainingWatch


class PeftTypeName(str):
    """String with the interface of a `PeftType` member; PEFT's enum has no SNELLA member."""

    @property
    def value(self) -> str:
        """The name without a prefix."""
        return str.__str__(self)

    def __str__(self) -> str:
        """Format as `PeftType.NAME`, because `get_model_status` splits the name at the dot."""
        return f"PeftType.{self.value}"


PEFT_TYPE = PeftTypeName("SNELLA")
_CARD_HEADING = "## How to load this adapter"
_CARD_TEXT = f"""{_CARD_HEADING}

This is a SNELLA adapter. Import `snella` first to register the method with PEFT; otherwise loading fails with
`KeyError: 'SNELLA'`.

```python
import snella  # noqa: F401, registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""

Preset = Literal["paper", "official", "matched"]
Allocation = Literal["competition", "uniform"]
ImportanceMetric = Literal["sensitivity", "magnitude", "delta_magnitude", "delta_mean_magnitude"]
Bias = Literal["none", "all", "snella_only"]

MATCHED_KERNELS = ("mix_k", "p_linear")
"""Kernels that `match_update` supports; their merged matrix includes a weighted sum of distances between pieces."""

# hints for names that other PEFT methods give to similar fields
_COUNTERPARTS = {
    **dict.fromkeys(("rank", "lora_r", "init_r", "target_r"), "the rank is r"),
    **dict.fromkeys(("alpha", "lora_alpha"), "the update is multiplied by scaling, without division by r"),
    **dict.fromkeys(("dropout", "lora_dropout"), "dropout on the update's input is update_dropout"),
    "sparsity": "the final fraction of zeros is target_sparsity",
    **dict.fromkeys(("tinit", "tfinal", "total_step"), "BudgetAllocator sets the length of the schedule"),
    "deltaT": "the allocation interval is realloc_every",
    "alpha_pattern": "the update is multiplied by scaling, the same for all layers",
    "use_rslora": "the update is multiplied by scaling, without division by r",
    "lora_bias": "bias='snella_only' trains the biases of the adapted layers",
    "init_lora_weights": "the field is init_weights",
    "fan_in_fan_out": "transposed weights (transformers' Conv1D) are detected automatically",
    "target_parameters": "SNELLA adapts weights of linear layers and convolutions, not bare parameters; for experts "
    "stored as one parameter, use LoraConfig(target_parameters=…) or train them in full with parameters_to_save",
    "use_dora": "SNELLA has no separate magnitude; use LoraConfig(use_dora=True)",
    "layer_replication": "build the model with the repeated layers, then adapt it",
    "megatron_config": "use LoraConfig for Megatron layers",
}
_NAME_PATTERN = re.compile(r"[\w.\-]+")
_FULL_SPARSITY_HINT = "0.9 keeps a tenth of the update; to train only the head, use snella train --method linear"

# values of each preset for fields left at None
_PAPER: dict[str, Any] = {
    "sparsify_mode": "soft",
    "learn_piece_coeff": True,
    "learn_temperature": False,
    "update_dropout": 0.0,
    "update_drop_path": 0.0,
    "dropout_exclude": [],
    "parameters_to_save": [],
    "zero_init_ema": False,
    "match_update": False,
    "schedule_end": 1.0,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "matched": {**_PAPER, "match_update": True, "schedule_end": 0.7},
    "official": {
        **_PAPER,
        "sparsify_mode": "official",
        "learn_piece_coeff": False,
        "learn_temperature": True,
        "update_dropout": 0.1,
        "update_drop_path": 0.1,
        # names of attention output projections in common libraries
        "dropout_exclude": ["proj", "out_proj", "o_proj", "to_out.0", "attn.c_proj", "attention.output.dense"],
        "parameters_to_save": ["cls_token"],
        "zero_init_ema": True,
    },
}


@dataclass
class SnellaConfig(PeftConfig):
    """Configuration of a SNELLA adapter; see `SnellaModel`.

    Args:
        r: Rank of the two factors; must be a multiple of `num_pieces` if the kernel has pieces.
        kernel: Kernel function that merges the factors: `mix_k`, `p_linear` (SNELL), `normalized_rbf`, `rbf`,
            `sigmoid`, or `linear` (LoRA's product).
        num_pieces: Number of pieces per factor row in `mix_k`, `p_linear`, and `normalized_rbf`; must divide `r`
            and every rank in `rank_pattern`.
        target_sparsity: Fraction of zeros in the update at the end of training, in `[0, 1)`.
        init_sparsity: Fraction of zeros in the update at the start of training, at most `target_sparsity`.
        target_modules: Modules to adapt: a list of names or suffixes, a regular expression for full names, or
            `"all-linear"` (every linear layer except the head, patch embedding, and patch merging). The default depends
            on the model: the attention projections of Stable Diffusion 3, the image encoder of SAM, or
            `"all-linear"`. If only the head has linear layers (e.g. in a ResNet), the default is the ungrouped
            convolutions, except the stem (the first convolution) and those inside modules named `downsample`.
        exclude_modules: Modules to exclude: a list of names or suffixes, or a regular expression for full names.
        layers_to_transform: Indices of the blocks to adapt; not available if `target_modules` is a regular expression.
        layers_pattern: Names of the lists of blocks, e.g. `layers`; defaults to the first numbered list in a module
            name. Requires `layers_to_transform`.
        qkv_groups: Number of matrices in fused query-key-value layers; each matrix competes separately. `"auto"`
            recognizes the names that timm and transformers use. An integer splits these layers into that many equal
            matrices (1 disables splitting). A mapping from suffixes to an integer or a list of row counts splits only
            the layers that it lists.
        rank_pattern: Ranks per layer, by module name or suffix, e.g. `{"attn.qkv": 16, "fc1": 4}`. The longest
            matching key wins; layers that match no key use `r`.
        modules_to_save: Modules to train in full and save with the adapter, such as the classifier head.
        trainable_token_indices: Rows of the input embedding to train, or a mapping from embedding names to rows, as in
            `LoraConfig`.
        ensure_weight_tying: Keep the output embedding tied to the input embedding if `modules_to_save` or
            `trainable_token_indices` trains the input embedding.
        bias: Biases to train and save: `"none"`, `"all"`, or `"snella_only"` (biases of adapted layers).
        parameters_to_save: Individual parameters to train in full and save, such as `cls_token`, by name or suffix.
        scaling: Scaling factor of the update.
        update_dropout: Dropout probability on the input of the update. Above 0, the layer computes two matrix products
            instead of one in training.
        update_drop_path: Probability that an entry of the input's first axis (a sample, or a window in windowed
            attention) skips the update. Above 0, the layer computes two matrix products instead of one in training.
        dropout_exclude: Suffixes of modules without `update_dropout`.
        preset: Defaults for fields left at `None`: `"paper"`; `"official"`, the behavior of the authors' released code;
            or `"matched"`, the paper's update with optimizer steps that are less sensitive to the learning rate
            (`match_update=True, schedule_end=0.7`).
        sparsify_mode: `"soft"` (eq. 13), `"official"`, or `"none"`. With `"none"`, the update is the merged matrix
            (kernelized LoRA), and `target_sparsity` must be 0.
        learn_piece_coeff: If True, learn the coefficients `α_p` of the pieces.
        learn_temperature: If True, learn the softmax temperature.
        zero_init_ema: If True, start the moving average of the importance at zero and update it after the optimizer
            step, as in the authors' code. Otherwise, it starts at the first value and is updated before the step.
        allocation: `"competition"` allocates the budget by importance, `"uniform"` by size (SNELL).
        schedule: Budget schedule: `cubic`, `quadratic`, `linear`, or `constant`.
        match_update: If True, `create_snella_optimizer` scales the factors' steps so that each step changes the update
            in proportion to its base weight (see `StepMatcher`). Requires the kernel `mix_k` or `p_linear`.
        schedule_end: Fraction of training after which the budget reaches its target, in `(0, 1]`. The paper uses 1.
            Below 1, the remaining steps train at the target sparsity.
        importance: Importance metric: `sensitivity` (eq. 11), `magnitude` (of the factors), `delta_magnitude` (of each
            entry of the update, the paper's W-Magnitude; stores two numbers per adapted weight), or
            `delta_mean_magnitude` (mean over the update).
        realloc_every: `"epoch"`, or the number of optimizer steps between allocations.
        beta1: Decay of the moving average of the importance.
        beta2: Decay of the moving average of the importance's uncertainty.
        min_layer_share: Minimum budget of each matrix, as a fraction of its uniform share. The paper uses 0.
        softmax_dim: 0 normalizes each column of the merged matrix over its outputs; 1, each row over its inputs.
        center_softmax: If True, center the softmax by subtracting its mean. Not in the paper.
        cache_delta: Save the merged matrix (the effective weight with numba) for the backward pass instead of
            rebuilding it. In evaluation mode, also cache the effective weight of layers with a quantized base weight.
        recompute_inputs: Recompute an adapted layer's input in the backward pass instead of saving it. Applies to
            outputs of normalizations and activations, whose input autograd saves anyway, and to tensors derived from
            them in supported blocks (windows, gates, modulations). The recomputed values are bit-identical. Writes to
            these outputs through `.data` are not detected and give wrong gradients; set `False` if your code does this.
            `False` in one adapter disables it for all adapters of the model.
        compress_activations: Store the inputs of normalizations and activations in int8 (see
            `snella.memory.origins.encode`), and queries, keys, and values in int8 instead of attention's saved
            tensors. The backward passes of these operations and of the layers that follow use the stored values.
            Outputs stay exact; gradients are computed at the rounded activations. Requires `recompute_inputs=True`. Has
            no effect unless all active adapters set it.
        weight_gradient: How to compute the updates' gradients in linear layers: `"exact"`; `"bfloat16"`, from tokens
            rounded to bfloat16 (faster on processors with bfloat16 instructions); or `"sample:P"`, an unbiased estimate
            from a fraction `P` of the tokens, e.g. `"sample:1/2"` (see `snella.ops.sample_tokens`). Outputs
            and all other gradients stay exact. Convolutions, `impl="reference"`, updates folded into a trained base
            weight, and weights that a model reads for operations other than `F.linear` always use exact gradients.
        impl: Implementation of the adapted layer: `"auto"`, `"triton"` (Triton kernels on a CUDA device), `"numba"`
            (Numba kernels on the CPU), `"eager"`, or `"reference"`; see `snella.functional.adapted_linear`.
        init_weights: `True` draws small factors: with `mix_k`, the RMS of the update of a 768×768 weight starts near
            5e-6. With `sigmoid` and `rbf`, the merged matrix starts near 0.5 and 1, respectively, so the initial
            update is large. In narrow layers, updates of kernels with pieces start smaller than in the paper (see
            `SnellaLayer.max_initial_ratio`). `False` draws larger factors, for tests.
        unused_modules: Set by `PeftModel.save_pretrained`; do not set it. Adapted modules that the model neither called
            nor read, and that are therefore untrained. Merging the loaded adapter warns about them.

    Raises:
        TypeError: If a field is unknown; the message suggests the closest field or its counterpart.
        ValueError: If any field has a wrong type, is out of range, or conflicts with another field. The message lists
            all wrong types or, if there are none, all other problems.
    """

    r: int = 8
    kernel: str = "mix_k"
    num_pieces: int = 2
    target_sparsity: float = 0.7
    init_sparsity: float = 0.0
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    qkv_groups: int | str | dict[str, int | list[int]] = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    parameters_to_save: list[str] | None = None
    scaling: float = 1.0
    update_dropout: float | None = None
    update_drop_path: float | None = None
    dropout_exclude: list[str] | None = None
    preset: str = "paper"
    sparsify_mode: str | None = None
    learn_piece_coeff: bool | None = None
    learn_temperature: bool | None = None
    zero_init_ema: bool | None = None
    allocation: str = "competition"
    schedule: str = "cubic"
    match_update: bool | None = None
    schedule_end: float | None = None
    importance: str = "sensitivity"
    realloc_every: int | str = "epoch"
    beta1: float = 0.85
    beta2: float = 0.85
    min_layer_share: float = 0.0
    softmax_dim: int = 0
    center_softmax: bool = False
    cache_delta: bool = False
    recompute_inputs: bool = True
    compress_activations: bool = False
    weight_gradient: str = "exact"
    impl: str = "auto"
    init_weights: bool = True
    unused_modules: list[str] | None = None

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Reject unknown fields and suggest the closest field."""
        names = {f.name for f in fields(cls)}
        errors = []
        for name in settings:
            if name in names:
                continue
            suggestion = did_you_mean(name, names)
            hint = _COUNTERPARTS.get(name) or suggestion or "see help(SnellaConfig)"
            # PEFT matches Python's wording to detect fields of a newer version
            errors.append(f"{cls.__name__} got an unexpected keyword argument {name!r}; {hint}")
        if errors:
            raise TypeError("; ".join(errors))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT's enum has no SNELLA member (see `snella.compat.registration`)
        self.peft_type = PEFT_TYPE
        self.watch = TrainingWatch()
        # check types first, because the later checks compare, hash, and compile the values
        errors = []
        for name, annotation in {**SnellaConfig.__annotations__, "inference_mode": "bool"}.items():
            value = getattr(self, name)
            if not _has_type(value, _FIELD_TYPES[name]):
                errors.append(f"{name} must be of type {annotation}, got {value!r}")
        if errors:
            raise ValueError("; ".join(errors))
        # module selections become sets below
        for name in SnellaConfig.__annotations__.keys() - {"target_modules", "exclude_modules"}:
            setattr(self, name, _with_lists(getattr(self, name)))
        preset = _PRESETS.get(self.preset, {})
        # a model may lack the parameters of a preset, but not parameters that the user names
        self.default_parameters = preset.get("parameters_to_save") if self.parameters_to_save is None else None
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)
        errors = [*self._choice_errors(), *self._range_errors(), *self._target_errors()]
        if errors:
            raise ValueError("; ".join(errors))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))

    def rank_of(self, module_name: str) -> int:
        """Return a layer's rank: the value of the longest matching key in `rank_pattern`, or `r` if none matches."""
        key = longest_suffix(module_name, self.rank_pattern)
        return self.r if key is None else self.rank_pattern[key]

    def dropout_of(self, module_name: str) -> float:
        """Return the dropout probability on the input of a layer's update."""
        is_excluded = any(has_suffix(module_name, suffix) for suffix in self.dropout_exclude or [])
        return 0.0 if is_excluded else self.update_dropout or 0.0

    def make_kernel(self) -> Kernel:
        """Return the kernel function that merges the factors."""
        return make_kernel(
            self.kernel,
            num_pieces=self.num_pieces,
            softmax_dim=self.softmax_dim,
            center_softmax=self.center_softmax,
        )

    # files ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, with sets as sorted lists so that saved files are reproducible."""
        settings: dict[str, Any] = super().to_dict()
        for name, value in settings.items():
            if isinstance(value, set):
                settings[name] = sorted(value)
        return settings

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` and add loading instructions to the model card next to it, if any."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and _CARD_HEADING not in (content := card.read_text(encoding="utf-8")):
            card.write_text(f"{content.rstrip()}\n\n{_CARD_TEXT}", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SnellaConfig:
        """Load the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: Folder of the adapter, or its repository ID on the Hub.
            subfolder: Subfolder that contains the adapter.
            kwargs: Download arguments, as in `PeftConfig.from_pretrained`.

        Raises:
            ValueError: If a field is invalid, the tensor file is damaged, or the ranks do not match the saved tensors.
                The error is raised before memory for the factors is allocated.
        """
        config: SnellaConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if not Path(pretrained_model_name_or_path).exists():
            download_kwargs, *_ = cls._split_kwargs(kwargs)
            name = SAFETENSORS_WEIGHTS_NAME
            with suppress(EntryNotFoundError):  # an adapter saved with safe_serialization=False
                path = Path(
                    hf_hub_download(pretrained_model_name_or_path, name, subfolder=subfolder, **download_kwargs)
                )
        if not path.is_file():  # without the tensors, their shapes cannot be checked
            return config
        try:
            with safe_open(path, framework="pt") as tensors:
                names = [name for name in tensors.keys() if name.endswith(".snella_A")]  # noqa: SIM118
                shapes = {name: list(tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; save the adapter again") from None
        for name, shape in shapes.items():
            module = name.removeprefix("base_model.model.").removesuffix(".snella_A")
            rank = config.rank_of(module)
            if shape[-1:] != [rank]:
                raise ValueError(
                    f"adapter_config.json sets rank {rank} for {module}, but {path} contains {name} of shape {shape}; "
                    "the configuration and the tensors belong to different adapters"
                )
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Drop `fixed_support`, a field in files of earlier versions, and reject its unsupported value `True`."""
        if kwargs.pop("fixed_support", False):
            raise ValueError(
                "fixed_support=True is not supported: the adapter has a predefined mask; train it again with the "
                "method 'fixed-mask'"
            )
        return kwargs

    def _choice_errors(self) -> list[str]:
        """Return messages about invalid choices, with the closest valid choice if any, and about conflicting ones."""
        choices = {
            "preset": get_args(Preset),
            "kernel": kernel_names() if find_kernel(self.kernel) is None else (self.kernel,),
            "sparsify_mode": get_args(SparsifyMode),
            "allocation": get_args(Allocation),
            "schedule": get_args(Schedule),
            "importance": get_args(ImportanceMetric),
            "bias": get_args(Bias),
            "impl": get_args(Implementation),
        }
        errors = []
        for name, allowed in choices.items():
            value = getattr(self, name)
            # an unknown preset leaves its fields at None; report only the preset
            if value not in allowed and not (value is None and self.preset not in _PRESETS):
                suggestion = did_you_mean(value, allowed)
                hint = f"; {suggestion}" if suggestion else ""
                errors.append(f"{name} must be one of {list(allowed)}, got {value!r}{hint}")
        try:
            parse_weight_gradient(self.weight_gradient)
        except ValueError as error:
            errors.append(str(error))
        if self.compress_activations and not self.recompute_inputs:
            errors.append("compress_activations=True requires recompute_inputs=True, got False")
        return errors

    def _range_errors(self) -> list[str]:
        """Return messages about values out of range, and about numbers that conflict with another field."""
        errors = []
        kernel = find_kernel(self.kernel)
        has_pieces = kernel is not None and "piece_coeff" in kernel.scalars
        errors += [
            f"{name} must be at least 1, got {name}={getattr(self, name)}"
            for name in ("r", "num_pieces")
            if getattr(self, name) < 1
        ]
        if not errors and has_pieces and self.r % self.num_pieces:
            lower = self.r // self.num_pieces * self.num_pieces
            suggestion = " or ".join(f"r={rank}" for rank in (lower, lower + self.num_pieces) if rank > 0)
            errors.append(f"r must be divisible by num_pieces={self.num_pieces}, got r={self.r}; use {suggestion}")
        pieces = self.num_pieces if has_pieces else 1
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                errors.append(f"rank_pattern[{key!r}] must be at least 1, got {rank}")
            elif rank % max(pieces, 1):  # an invalid `num_pieces` has been reported above
                errors.append(f"rank_pattern[{key!r}] must be a multiple of num_pieces={pieces}, got {rank}")
        if not 0 <= self.target_sparsity < 1:
            hint = ""
            if self.target_sparsity == 1:
                hint = f"; {_FULL_SPARSITY_HINT}"
            elif 1 < self.target_sparsity < 100:  # probably a percentage
                hint = f"; did you mean {self.target_sparsity / 100:g}?"
            errors.append(f"target_sparsity must be in [0, 1), got {self.target_sparsity}{hint}")
        elif not 0 <= self.init_sparsity <= self.target_sparsity:
            errors.append(
                f"init_sparsity must be in [0, target_sparsity], got {self.init_sparsity} "
                f"with target_sparsity={self.target_sparsity}"
            )
        if self.sparsify_mode == "none" and self.target_sparsity != 0:
            errors.append(
                f"sparsify_mode='none' keeps every entry of the update; target_sparsity must be 0, got "
                f"{self.target_sparsity}"
            )
        if not math.isfinite(self.scaling) or self.scaling == 0:
            errors.append(f"scaling must be finite and not 0, got {self.scaling}")
        for name in ("beta1", "beta2", "update_dropout", "update_drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                errors.append(f"{name} must be in [0, 1), got {value}")
        if not 0 <= self.min_layer_share <= 1:
            errors.append(f"min_layer_share must be in [0, 1], got {self.min_layer_share}")
        if self.match_update and self.kernel not in MATCHED_KERNELS:
            errors.append(
                f"match_update=True requires a kernel in {list(MATCHED_KERNELS)}, got kernel={self.kernel!r}; "
                "set match_update=False"
            )
        if self.schedule_end is not None and not 0 < self.schedule_end <= 1:
            errors.append(f"schedule_end must be in (0, 1], got {self.schedule_end}; 1 is the end of training")
        if self.softmax_dim not in (0, 1):
            errors.append(f"softmax_dim must be 0 or 1, got {self.softmax_dim}")
        interval = self.realloc_every
        if interval != "epoch" and (isinstance(interval, str) or interval < 1):
            errors.append(f"realloc_every must be 'epoch' or a positive number of steps, got {interval!r}")
        groups = self.qkv_groups
        values: Any = groups.values() if isinstance(groups, dict) else [groups]
        counts: list[Any] = []
        for value in values:
            if isinstance(value, (int, str)):
                counts.append(value)
            else:
                counts.extend(value)
        if groups != "auto" and any(isinstance(count, str) or count < 1 for count in counts):
            errors.append(
                "qkv_groups must be 'auto', a positive integer, or a mapping to positive integers or lists of them, "
                f"got {groups!r}"
            )
        return errors

    def _target_errors(self) -> list[str]:
        """Return messages about invalid patterns and invalid combinations in the module selection."""
        errors = []
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                try:
                    regex.compile(value)
                except regex.error as error:
                    errors.append(f"{name} must be a regular expression or a list of names, got {value!r}: {error}")
        for name in ("target_modules", "exclude_modules", "dropout_exclude"):
            if isinstance(value := getattr(self, name), list | set | tuple) and "" in value:
                errors.append(f"{name} must not contain empty names, got {value!r}")
        # PEFT and snella build regular expressions from these names
        for name in ("modules_to_save", "rank_pattern", "layers_pattern"):
            value = getattr(self, name) or []
            for module_name in [value] if isinstance(value, str) else value:
                if not _NAME_PATTERN.fullmatch(module_name):
                    errors.append(f"{name} must contain module names or suffixes, got {module_name!r}")
        is_expression = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        for name in ("layers_to_transform", "layers_pattern"):
            if is_expression and getattr(self, name) is not None:
                errors.append(
                    f"{name} cannot be combined with a regular expression, got target_modules={self.target_modules!r} "
                    f"and {name}={getattr(self, name)!r}; put the block indices into the regular expression"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            errors.append(f"layers_pattern requires layers_to_transform, got layers_pattern={self.layers_pattern!r}")
        return errors


def read_config(folder: str | Path) -> PeftConfig:
    """Read the configuration of an adapter of any PEFT method, without its tensors.

    Raises:
        ValueError: If the file is corrupt, or the method is not registered with PEFT.
    """
    path = Path(folder, CONFIG_NAME)
    settings = PeftConfig.from_json_file(str(path))
    peft_type = settings.get("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if config_class is None:
        raise ValueError(f"peft_type in {path} must be a PEFT method, got {peft_type!r}")
    config: PeftConfig = config_class.from_peft_type(**config_class.check_kwargs(**settings))
    return config


def _has_type(value: Any, annotation: Any) -> bool:
    """Return whether a value has the given type; tuples, sets, and ranges count as lists, and integers as floats."""
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is UnionType:
        return any(_has_type(value, option) for option in args)
    if origin in (list, set):
        return isinstance(value, (list, tuple, set, range)) and all(_has_type(item, args[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        key_type, value_type = args
        return all(_has_type(key, key_type) and _has_type(item, value_type) for key, item in value.items())
    # `bool` is a subclass of `int`, but does not count as a number
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def _with_lists(value: Any) -> Any:
    """Replace tuples, sets, and ranges, including those in a dict, with lists, so that they can be saved as JSON."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value


_FIELD_TYPES = get_type_hints(SnellaConfig)  # requires the complete class

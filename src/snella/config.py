"""Settings of one SNELLA adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import regex
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from snella._text import did_you_mean
from snella.allocation import Schedule
from snella.backends import resolve_implementation
from snella.kernels import KERNELS, Kernel, make_kernel
from snella.memory.sampling import parse_weight_gradient
from snella.sparsify import SparsifyMode
from snella.watch import TrainingWatch


class PeftTypeName(str):
    """Name of a method that PEFT's enumeration lacks: a plain string with what PEFT asks of an enumeration's member."""

    @property
    def value(self) -> str:
        """The name itself."""
        return str.__str__(self)

    def __str__(self) -> str:
        """As a member of PEFT's enumeration prints itself; `get_model_status` takes what follows the dot."""
        return f"PeftType.{self.value}"


PEFT_TYPE = PeftTypeName("SNELLA")
_CARD_HEADING = "## How to load this adapter"
_CARD_TEXT = f"""{_CARD_HEADING}

It is a SNELLA adapter. PEFT knows the method once the package `snella` is imported; without it, loading ends in
`KeyError: 'SNELLA'`.

```python
import snella  # noqa: F401, makes PEFT know the method
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""

Preset = Literal["paper", "official", "matched"]
Allocation = Literal["competition", "uniform"]
ImportanceMetric = Literal["sensitivity", "magnitude", "delta_magnitude", "delta_mean_magnitude"]
Bias = Literal["none", "all", "snella_only"]

MATCHED_KERNELS = ("mix_k", "p_linear")
"""Kernels whose steps `match_update` knows how to scale: sums of piecewise distances."""

# what other methods of PEFT have under these names, and what to use instead
_INSTEAD = {
    **dict.fromkeys(("rank", "lora_r", "init_r", "target_r"), "the rank is r"),
    **dict.fromkeys(("alpha", "lora_alpha"), "the factor before the update is scaling, without a division by r"),
    **dict.fromkeys(("dropout", "lora_dropout"), "dropout on the update's input is update_dropout"),
    "sparsity": "the fraction of zeros at the end is target_sparsity",
    **dict.fromkeys(("tinit", "tfinal", "total_step"), "the length of the schedule is an argument of BudgetAllocator"),
    "deltaT": "the steps from one allocation to the next are realloc_every",
    "alpha_pattern": "the factor before the update is scaling, the same for all layers",
    "use_rslora": "the factor before the update is scaling, without a division by r",
    "lora_bias": "bias='snella_only' trains the biases of the adapted layers",
    "init_lora_weights": "the field is init_weights",
    "fan_in_fan_out": "transposed weights (transformers' Conv1D) are recognized without it",
    "target_parameters": "SNELLA adapts weights of linear layers and convolutions, not bare parameters; experts stored "
    "as one parameter can be adapted by LoraConfig(target_parameters=…), or trained in full with parameters_to_save",
    "use_dora": "there is no magnitude of its own in SNELLA; use LoraConfig(use_dora=True)",
    "layer_replication": "build the model with the repeated layers, then adapt it",
    "megatron_config": "use LoraConfig for layers of Megatron",
}
_NAME = re.compile(r"[\w.\-]+")
_NO_UPDATE = "0.9 keeps a tenth of the update; to train nothing, remove the adapter (snella train --method linear)"

# what a preset decides where the user leaves a field at None
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
        "sparsify_mode": "official",
        "learn_piece_coeff": False,
        "learn_temperature": True,
        "update_dropout": 0.1,
        "update_drop_path": 0.1,
        # the output projection of the attention, by the names that libraries use
        "dropout_exclude": ["proj", "out_proj", "o_proj", "to_out.0", "attn.c_proj", "attention.output.dense"],
        "parameters_to_save": ["cls_token"],
        "zero_init_ema": True,
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
        num_pieces: Pieces that each factor row is cut into; `r` and every rank of `rank_pattern` are multiples of it.
        target_sparsity: Fraction of the adapted weights that is zero in the update once training ends, in `[0, 1)`.
        init_sparsity: The same when training starts, at most `target_sparsity`.
        target_modules: Modules to adapt: a list of names or suffixes, a regular expression, or `"all-linear"` (every
            linear layer of any model but the head, patch embedding and patch merging). `None` chooses by model: the
            attention projections of Stable Diffusion 3, the image encoder of SAM, else `"all-linear"`; in a model
            without linear layers besides its head, such as a ResNet, every ungrouped convolution but the first one
            (the stem) and those called `downsample`.
        exclude_modules: Modules to leave out, a list of names or suffixes or a regular expression.
        layers_to_transform: Block numbers to adapt, with `target_modules` as a list.
        layers_pattern: Name of the list of blocks, if it is not the first numbered one.
        qkv_groups: How fused query-key-value layers are cut into matrices that compete on their own. `"auto"` knows
            the names that timm and transformers use; an integer cuts those layers into that many equal matrices (1:
            not at all); a mapping from suffixes to an integer or a list of row counts decides layer by layer.
        rank_pattern: Ranks of single layers, by name or suffix of the module, e.g. `{"attn.qkv": 16, "fc1": 4}`. Of
            several that match a module, the longest decides; all others have `r`.
        modules_to_save: Modules that are trained in full and saved with the adapter, such as the classifier head.
        trainable_token_indices: Rows of the input embedding to train, or a mapping from the names of embeddings to
            rows, as in `LoraConfig`.
        ensure_weight_tying: Keep the output embedding tied where `modules_to_save` or `trainable_token_indices` train
            an input embedding that it shares its weight with.
        bias: Biases to train and save: `"none"`, `"all"` of the model's, or `"snella_only"`, those of adapted layers.
        parameters_to_save: The same for bare parameters, such as `cls_token`, by name or suffix.
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
        zero_init_ema: Whether the importance's moving averages start at zero and are read after the optimizer's step,
            as in the authors' code, instead of at the first value and before it.
        allocation: `"competition"` shares the budget out by importance, `"uniform"` by size (SNELL).
        schedule: How the budget shrinks: `cubic`, `quadratic`, `linear` or `constant`.
        match_update: Whether `create_snella_optimizer` scales the factors' steps so that each changes the update in
            proportion to the weight it is added to (see `StepMatcher`); for the kernels `mix_k` and `p_linear`.
        schedule_end: Fraction of the training after which the budget has reached its target, in `(0, 1]`; 1 is the
            paper. Below 1, the steps that are left train the sparsity that was asked for.
        importance: `sensitivity` (eq. 11), `magnitude` of the factors, `delta_magnitude` of the update entry by entry
            (the paper's W-Magnitude; keeps two numbers for each adapted weight), or `delta_mean_magnitude`, the mean of
            the update's magnitudes, one number a matrix.
        realloc_every: `"epoch"`, or a number of optimizer steps.
        beta1: Decay of the moving average of the importance.
        beta2: Decay of the moving average of its uncertainty.
        min_layer_share: Fraction of its uniform share that every matrix keeps; 0 is the paper.
        softmax_dim: 0 normalizes each column of the merged matrix over its outputs, 1 each row over its inputs.
        center_softmax: Subtract the softmax's mean. Not in the paper.
        cache_delta: Keep the merged matrix for the backward pass instead of rebuilding it (with numba the effective
            weight), and in evaluation the effective weight of a layer whose base weight is quantized.
        recompute_inputs: Do not keep an adapted layer's input where it is the output of a normalization or an
            activation, whose own input autograd keeps anyway, or is made of one in a known block (windows, gates,
            modulations): compute it again in the backward pass, to the same bits. Values written into such an output
            through `.data` are not noticed, and give wrong gradients; set `False` for code that does so.
        compress_activations: Keep the inputs of normalizations and activations in eight bits (see
            `snella.memory.compression.encode`), and queries, keys and values in the place of what attention keeps: for
            their own backward pass and for the layers behind them. Outputs stay exact, gradients are those at rounded
            activations.
        weight_gradient: What the updates' gradients in linear layers are computed from: `"exact"`; `"bfloat16"`, tokens
            rounded to it, faster where the processor multiplies such numbers; or `"sample:P"`, a share `P` of the
            tokens, such as `"sample:1/2"`, without bias (see `snella.memory.sampling.sample_tokens`). Outputs and all
            other gradients stay exact; so do convolutions, `impl="reference"` and weights that a model reads for
            something else than `F.linear`.
        fixed_support: Let `layer.set_support` say once which entries may change (the paper's predefined mask), instead
            of letting them compete: the update is then the merged matrix itself at these entries, unshrunk. Sparsities,
            schedule and allocation mean nothing then.
        impl: Implementation of the adapted layer: `"auto"`, `"triton"` (kernels on a CUDA device), `"numba"` (Numba
            kernels on the CPU), `"eager"` or `"reference"`; see `snella.adapted_linear`.
        init_weights: `True` starts with factors so small that the update of a weight of ViT-B's size starts near 5e-6,
            and smaller than the paper's where a layer is narrow (`SnellaLayer.largest_start`); `False` draws larger
            ones, for tests.
        unused_modules: Written when an adapter is saved, not meant to be set: adapted modules that no pass has used, so
            that they are not trained. Merging the loaded adapter names them.

    Raises:
        TypeError: A setting that there is not, with the nearest one or with what serves instead.
        ValueError: One error that lists every setting of a wrong kind or out of range.
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
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "ranks of single layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of the embedding to train"}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "keep tied embeddings tied"})
    bias: str = field(default="none", metadata={"help": "none, all or snella_only"})
    parameters_to_save: list[str] | None = field(default=None, metadata={"help": "bare parameters trained in full"})
    scaling: float = field(default=1.0, metadata={"help": "factor before the update"})
    update_dropout: float | None = field(default=None, metadata={"help": "dropout on the update's input"})
    update_drop_path: float | None = field(default=None, metadata={"help": "chance that a sample skips the update"})
    dropout_exclude: list[str] | None = field(default=None, metadata={"help": "modules without update_dropout"})
    preset: str = field(default="paper", metadata={"help": "paper, official or matched"})
    sparsify_mode: str | None = field(default=None, metadata={"help": "soft, official or none"})
    learn_piece_coeff: bool | None = field(default=None, metadata={"help": "learn the piece coefficients"})
    learn_temperature: bool | None = field(default=None, metadata={"help": "learn the softmax temperature"})
    zero_init_ema: bool | None = field(default=None, metadata={"help": "moving averages as in the authors' code"})
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
    cache_delta: bool = field(default=False, metadata={"help": "keep the merged matrix for the backward pass"})
    recompute_inputs: bool = field(default=True, metadata={"help": "compute inputs again instead of keeping them"})
    compress_activations: bool = field(default=False, metadata={"help": "keep activations in eight bits"})
    weight_gradient: str = field(default="exact", metadata={"help": "exact, bfloat16, or sample:P of the tokens"})
    fixed_support: bool = field(default=False, metadata={"help": "change entries that are given, see set_support"})
    impl: str = field(default="auto", metadata={"help": "implementation of the adapted layer"})
    init_weights: bool = field(default=True, metadata={"help": "start next to the pre-trained model"})
    unused_modules: list[str] | None = field(default=None, metadata={"help": "written on saving: modules never used"})

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse settings that there are not, with the remedy."""
        names = {setting.name for setting in fields(cls)}
        errors = []
        for name in [name for name in settings if name not in names]:
            near = did_you_mean(name, names)
            hint = _INSTEAD.get(name) or near or "see help(SnellaConfig)"
            # in Python's words, by which PEFT tells settings of a newer version
            errors.append(f"{cls.__name__} got an unexpected keyword argument {name!r}; {hint}")
        if errors:
            raise TypeError("; ".join(errors))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT's own enumeration has no such member, see snella.compat.registration
        self.peft_type = PEFT_TYPE
        self.watch = TrainingWatch()
        # kinds first: what comes after may compare, hash and compile
        if errors := self._kind_errors():
            raise ValueError("; ".join(errors))
        self._apply_preset()
        errors = [*self._choice_errors(), *self._range_errors(), *self._target_errors()]
        if errors:
            raise ValueError("; ".join(errors))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

    def rank_of(self, module_name: str) -> int:
        """Return the rank of a layer: that of the longest key of `rank_pattern` which is its name or a suffix of it."""
        keys = [key for key in self.rank_pattern if module_name == key or module_name.endswith(f".{key}")]
        return self.rank_pattern[max(keys, key=len)] if keys else self.r

    def make_kernel(self) -> Kernel:
        """Return the kernel function that merges the factors."""
        return make_kernel(
            self.kernel,
            num_pieces=self.num_pieces,
            softmax_dim=self.softmax_dim,
            center_softmax=self.center_softmax,
        )

    def wanted_tokens(self) -> list[str]:
        """Names of the bare parameters to train: the user's, or the preset's whatever another model made of them."""
        return list(
            (self.parameters_to_save if self.requires_tokens else _PRESETS[self.preset]["parameters_to_save"]) or []
        )

    # files ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, sets as sorted lists, so that files have the same bytes in every process."""
        settings: dict[str, Any] = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and say in the model card beside it which package loads the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and _CARD_HEADING not in (text := card.read_text(encoding="utf-8")):
            card.write_text(f"{text.rstrip()}\n\n{_CARD_TEXT}", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SnellaConfig:
        """Read the settings of a saved adapter.

        Args:
            pretrained_model_name_or_path: Folder of the adapter, or its name on the Hub.
            subfolder: Folder within it.
            kwargs: Settings of the download, as in `PeftConfig.from_pretrained`.

        Raises:
            ValueError: The ranks are not those of the tensors beside the settings; nothing has been allocated by then.
        """
        config: SnellaConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if not Path(pretrained_model_name_or_path).exists():
            download, *_ = cls._split_kwargs(kwargs)
            name = SAFETENSORS_WEIGHTS_NAME
            path = Path(hf_hub_download(pretrained_model_name_or_path, name, subfolder=subfolder, **download))
        if path.is_file():
            config.check_ranks(path)
        return config

    def check_ranks(self, path: Path) -> None:
        """Compare the ranks with those of the factors in a file, whose header alone is read.

        Args:
            path: A safetensors file.

        Raises:
            ValueError: They differ.
        """
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(".snella_A")]  # noqa: SIM118
            shapes = {name: list(tensors.get_slice(name).get_shape()) for name in names}
        for name, shape in shapes.items():
            rank = self.rank_of(name.removeprefix("base_model.model.").removesuffix(".snella_A"))
            if shape[-1:] != [rank]:
                raise ValueError(
                    f"the settings of the adapter ask for r={rank} where {path} holds {name} {shape}; "
                    "adapter_config.json and the tensors beside it belong to different adapters"
                )

    def _apply_preset(self) -> None:
        """Fill what the user left at `None`."""
        # a preset's tokens may be absent from a model, the user's own may not
        self.requires_tokens = self.parameters_to_save is not None
        for name, value in _PRESETS[self.preset].items() if self.preset in list(_PRESETS) else ():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)

    def _choice_errors(self) -> list[str]:
        """Name every field whose value is not among its choices, with the nearest one."""
        choices = {
            "preset": get_args(Preset),
            "kernel": tuple(KERNELS),
            "sparsify_mode": get_args(SparsifyMode),
            "allocation": get_args(Allocation),
            "schedule": get_args(Schedule),
            "importance": get_args(ImportanceMetric),
            "bias": get_args(Bias),
        }
        errors = []
        for name, allowed in choices.items():
            value = getattr(self, name)
            # a wrong preset leaves its dependants at None: one error, not seven
            if value not in allowed and not (value is None and self.preset not in list(_PRESETS)):
                near = did_you_mean(str(value), allowed)
                errors.append(f"{name} must be one of {list(allowed)}, got {value!r}{near and '; ' + near}")
        for check, value in ((resolve_implementation, self.impl), (parse_weight_gradient, self.weight_gradient)):
            try:
                check(value)
            except ValueError as error:
                errors.append(str(error))
        if self.compress_activations and not self.recompute_inputs:
            errors.append("compress_activations=True needs recompute_inputs=True, got False")
        return errors

    def _range_errors(self) -> list[str]:
        """Name every number out of range."""
        errors = []
        cuts_rows = self.kernel in list(KERNELS) and "piece_coeff" in KERNELS[self.kernel].scalars
        errors += [
            f"{name} must be at least 1, got {name}={getattr(self, name)}"
            for name in ("r", "num_pieces")
            if getattr(self, name) < 1
        ]
        if not errors and cuts_rows and self.r % self.num_pieces:
            below = self.r // self.num_pieces * self.num_pieces
            near = " or ".join(f"r={rank}" for rank in (below, below + self.num_pieces) if rank > 0)
            errors.append(f"r must be divisible by num_pieces={self.num_pieces}, got r={self.r}; {near} would fit")
        for key, rank in self.rank_pattern.items():
            pieces = self.num_pieces if cuts_rows else 1
            if rank < 1 or rank % max(pieces, 1):
                errors.append(f"rank_pattern[{key!r}] must be a multiple of num_pieces={pieces}, got {rank}")
        if not 0 <= self.target_sparsity < 1:
            is_percent = 1 < self.target_sparsity < 100
            hint = f"did you mean {self.target_sparsity / 100:g}?" if is_percent else _NO_UPDATE
            errors.append(f"target_sparsity must be in [0, 1), got {self.target_sparsity}; {hint}")
        elif not 0 <= self.init_sparsity <= self.target_sparsity:
            errors.append(
                f"init_sparsity must be in [0, target_sparsity], got {self.init_sparsity} "
                f"with target_sparsity={self.target_sparsity}"
            )
        if self.sparsify_mode == "none" and self.target_sparsity != 0:
            errors.append(
                f"sparsify_mode='none' keeps every weight of the update: target_sparsity must be 0, got "
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
                f"match_update=True needs a kernel of {list(MATCHED_KERNELS)}, got kernel={self.kernel!r}; "
                "set match_update=False"
            )
        if self.schedule_end is not None and not 0 < self.schedule_end <= 1:
            errors.append(f"schedule_end must be in (0, 1], got {self.schedule_end}; 1 shrinks the budget to the end")
        if self.softmax_dim not in (0, 1):
            errors.append(f"softmax_dim must be 0 or 1, got {self.softmax_dim}")
        every = self.realloc_every
        if every != "epoch" and not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
            errors.append(f"realloc_every must be 'epoch' or a number of steps of at least 1, got {every!r}")
        if self.fixed_support and (self.update_dropout or self.update_drop_path):
            errors.append(
                f"fixed_support=True needs update_dropout=0 and update_drop_path=0, got {self.update_dropout} and "
                f"{self.update_drop_path}"
            )
        groups = self.qkv_groups
        if not (groups == "auto" or isinstance(groups, dict) or (isinstance(groups, int) and groups >= 1)):
            errors.append(f"qkv_groups must be 'auto', a number of at least 1 or a mapping, got {groups!r}")
        return errors

    def _kind_errors(self) -> list[str]:
        """Name every field whose value is of a wrong kind, with what is required."""
        errors = []
        for names, is_right, required in _KINDS:
            for name in names:
                value = getattr(self, name)
                # a preset's fields may be left open; whatever else is None has that for its default
                if value is None and _DEFAULTS[name] is None:
                    continue
                if not is_right(value):
                    errors.append(f"{name} must be {required}, got {value!r}")
        return errors

    def _target_errors(self) -> list[str]:
        """Name what cannot be read or combined in the selection of modules."""
        errors = []
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                try:
                    regex.compile(value)
                except regex.error as error:
                    errors.append(f"{name} must be a regular expression or a list of names, got {value!r}: {error}")
        # these become parts of regular expressions, PEFT's or ours
        for name in ("modules_to_save", "rank_pattern", "layers_pattern"):
            names = getattr(self, name) or []
            for key in [names] if isinstance(names, str) else names:
                if not _NAME.fullmatch(key):
                    errors.append(f"{name} takes names or suffixes of modules, got {key!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                if self.target_modules.lower() == "all-linear":
                    continue
                errors.append(
                    f"{name} needs target_modules as a list, got target_modules={self.target_modules!r} "
                    f"and {name}={getattr(self, name)!r}; put the block numbers into the regular expression"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            errors.append(f"layers_pattern needs layers_to_transform, got layers_pattern={self.layers_pattern!r}")
        return errors


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)


def _are_names_or_expression(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple, range)) and all(map(_is_integer, value))


def _is_mapping(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_right(v) for key, v in value.items())


def _is_rows(value: Any) -> bool:
    return _are_integers(value) or _is_mapping(value, _are_integers)


def _is_cut(value: Any) -> bool:
    return (
        isinstance(value, str) or _is_integer(value) or _is_mapping(value, lambda v: _is_integer(v) or _are_integers(v))
    )


# names of fields, whether a value is of their kind, and what that is
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("r", "num_pieces", "softmax_dim"), _is_integer, "an integer"),
    (
        (
            *("target_sparsity", "init_sparsity", "scaling", "beta1", "beta2", "min_layer_share"),
            *("update_dropout", "update_drop_path", "schedule_end"),
        ),
        _is_number,
        "a number",
    ),
    (
        (
            *(
                "learn_piece_coeff",
                "learn_temperature",
                "zero_init_ema",
                "center_softmax",
                "cache_delta",
                "recompute_inputs",
                "compress_activations",
                "fixed_support",
            ),
            *("init_weights", "ensure_weight_tying", "inference_mode", "match_update"),
        ),
        lambda value: isinstance(value, bool),
        "True or False",
    ),
    (("target_modules", "exclude_modules"), _are_names_or_expression, "a list of names or a regular expression"),
    (("layers_pattern",), _are_names_or_expression, "a name or a list of names"),
    (("modules_to_save", "parameters_to_save", "dropout_exclude"), _are_names, "a list of names"),
    (
        ("layers_to_transform",),
        lambda value: _is_integer(value) or _are_integers(value),
        "an integer or a list of them",
    ),
    (("rank_pattern",), lambda value: _is_mapping(value, _is_integer), "a mapping from names of modules to integers"),
    (("trainable_token_indices",), _is_rows, "a list of integers or a mapping from names of embeddings to such lists"),
    (("qkv_groups",), _is_cut, "'auto', a number of at least 1 or a mapping to numbers or lists of row counts"),
)
_DEFAULTS = {setting.name: setting.default for setting in fields(SnellaConfig)}

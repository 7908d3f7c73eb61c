"""The PEFT tuner that replaces a model's layers with `SnellaLayer`s, whose updates are computed from small factors.

A *target* is a module that the configuration selects for adaptation. A *token* is a bare parameter that an adapter
trains in full, such as `cls_token`. A *mark* on the output of a normalization or activation lets the backward pass
recompute this output instead of saving it.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella._utils import has_suffix, listed
from snella.budgets import budget_error, buffers_off_meta
from snella.compat.attention import (
    AdaptedAttention,
    Projection,
    ProjectionView,
    disable_fast_path,
    input_projections,
    is_adaptable,
)
from snella.compat.hooks import onloaded
from snella.compat.quantization import combined_warning
from snella.compat.tokens import TokenAdapter, attach_tokens, find_tokens, token_adapters
from snella.config import SnellaConfig
from snella.layer import SnellaLayer, drop_adapter
from snella.memory.recompute import mark_outputs, unmark_outputs
from snella.merge import check_parameter
from snella.ops import has_bfloat16_instructions
from snella.targets import (
    all_linear_names,
    block_number,
    check_expression,
    choose_layer_class,
    class_name,
    count_rows,
    default_targets,
    describe_coverage,
    head_layers,
    matches_expression,
    matrix_shape,
    plain_convolution_names,
    reject_quantized_projection,
    unmatched_message,
)
from snella.watch import TrainingWatch, warn_about_unused_merges

logger = logging.getLogger(__name__)

_MIN_ENTRY_LIMIT = 1 << 24  # factor entries that are always allowed: 64 MiB in float32
_HEADS_ADDED_BY_PEFT = ("classifier", "score", "qa_outputs")  # added to `modules_to_save` for some task types


class SnellaModel(BaseTuner):
    """A model with sparse, high-rank weight updates (SNELLA, arXiv 2510.24037).

    Usually created with `peft.get_peft_model(model, SnellaConfig(…))`.

    Args:
        model: Model to adapt, any `nn.Module`.
        config: Configuration of the first adapter.
        adapter_name: Name of the first adapter.
        low_cpu_mem_usage: If True, create the factors on the meta device, because loading fills them.

    Raises:
        ValueError: If no module matches `target_modules` or a key of `rank_pattern` or `qkv_groups`, if matching an
            expression takes too long, if the factors are far larger than the weights, if `qkv_groups` does not fit a
            fused layer, if `parameters_to_save` names a missing parameter, one inside an adapted layer, or a shared one
            twice, or if `trainable_token_indices` names a missing embedding or row.
        TypeError: If a targeted module is neither linear nor a 2D convolution, or `config` is not a `SnellaConfig`.
        NotImplementedError: If a targeted module has an unsupported quantized weight or padding, a shared weight, a
            custom `forward`, or an adapter of a different method, or is the output projection of an attention module at
            the root; if `impl` does not support the updates; or if `ensure_weight_tying=True` and a target is tied.
        ImportError: If `impl` is `"triton"` or `"numba"`, and the package is missing or unusable.
        RuntimeError: If a targeted bitsandbytes module is not quantized yet, or `impl` is `"triton"` and its kernels
            fail the first-use check.
    """

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Return the config unchanged, because `_prepare_model` resolves the targets."""
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Resolve and validate the targets and tokens before changing the model.

        The resolved names replace those in the configuration.
        """
        if not isinstance(peft_config, SnellaConfig):
            raise TypeError(f"config must be a SnellaConfig, got {type(peft_config).__name__}")
        module_names = [name for name, _ in model.named_modules()]
        for expression in (peft_config.target_modules, peft_config.exclude_modules):
            if isinstance(expression, str) and expression.lower() != "all-linear":
                check_expression(expression, module_names)
        targets = self._resolve_targets(peft_config.target_modules, model)
        peft_config.target_modules = targets = self._add_output_projections(targets, peft_config, model)
        # raise only if no name matches; PEFT handles excluded names
        if not _matching_names(targets, model):
            raise ValueError(unmatched_message(targets, model))
        self._reject_shared_weights(peft_config, model)
        self._check_ranks(peft_config, model)
        _check_token_rows(peft_config, model)
        # a model may lack the parameters of a preset, but not those that the user names
        preset_names = peft_config.default_parameters
        is_required = preset_names is None
        names = peft_config.parameters_to_save if preset_names is None else preset_names
        tokens = find_tokens(model, names or [], is_required=is_required)
        inside_targets = [name for name in tokens if self._is_in_target(peft_config, name)]
        if inside_targets and is_required:
            raise ValueError(
                "parameters_to_save must name parameters outside adapted layers, got "
                f"{listed(map(repr, inside_targets), 3)}; train their biases with bias='snella_only', or exclude the "
                "layers with exclude_modules"
            )
        peft_config.parameters_to_save = [name for name in tokens if name not in inside_targets]

    def _is_in_target(self, peft_config: SnellaConfig, parameter_name: str) -> bool:
        """Return whether a parameter is inside a target module."""
        parts = parameter_name.split(".")
        module_names = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return any(self._check_target_module_exists(peft_config, name) for name in module_names)

    def _resolve_targets(self, targets: set[str] | list[str] | str | None, model: nn.Module) -> set[str] | str:
        """Resolve `None` and `"all-linear"` to module names, and warn if the names exclude most of the weights.

        Returns a regular expression unchanged, and a list of names as a set.
        """
        is_default = targets is None
        if targets is None:
            targets = default_targets(model)
            if isinstance(targets, str) and targets != "all-linear":
                # a set of names, which `layers_to_transform` can filter
                return _full_names(_matching_names(targets, model), model)
        if not isinstance(targets, str):
            return set(targets)
        if targets.lower() != "all-linear":
            return targets
        names = all_linear_names(model)
        if not names and is_default:
            names = plain_convolution_names(model)
        if not names:
            convolutions = plain_convolution_names(model)
            layers = "linear layer and no inner convolution" if is_default else "linear layer"
            value = None if is_default else targets
            message = f"target_modules={value!r} matches no {layers} in {type(model).__name__} besides its head"
            if convolutions:
                message += f"; target_modules=None adapts its convolutions, e.g. {convolutions[0]!r}"
            raise ValueError(message)
        is_first_adapter = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if is_first_adapter and (coverage := describe_coverage(model, names)):
            warnings.warn(coverage, stacklevel=2)
        return _full_names(set(names), model)

    def _check_ranks(self, peft_config: SnellaConfig, model: nn.Module) -> None:
        """Reject keys of `rank_pattern` and `qkv_groups` that match no module, and factors far larger than the weights.

        This check runs before the factors are allocated.
        """
        names = []
        num_weights = 0
        num_entries = 0
        for name, module in model.named_modules():
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if name.endswith(".base_layer") or not self._check_target_module_exists(peft_config, name):
                continue
            if is_adaptable(module):
                attention = module.base_layer if isinstance(module, AdaptedAttention) else module
                inputs = input_projections(cast(nn.MultiheadAttention, attention))
                shapes = [(f"{name}.{key}", tuple(attention.get_parameter(f"{key}_weight").shape)) for key in inputs]
            elif isinstance(base, (nn.Linear, nn.Conv2d, Conv1D)):
                shapes = [(name, matrix_shape(base))]
            else:
                continue
            for weight_name, (m, n) in shapes:
                # an adapted attention module contains its output projection in `base_layer`
                module_name = weight_name.replace(".base_layer.", ".")
                names.append(module_name)
                num_weights += m * n
                num_entries += peft_config.rank_of(module_name) * (m + n)
        for field in ("rank_pattern", "qkv_groups"):
            value = getattr(peft_config, field)
            keys = value if isinstance(value, dict) else ()
            if unused := [key for key in keys if not any(has_suffix(name, key) for name in names)]:
                raise ValueError(f"{field}={unused} matches no adapted module; adapted modules are e.g. {names[:4]}")
        if num_entries > max(_MIN_ENTRY_LIMIT, 4 * num_weights):
            pattern = f", rank_pattern={peft_config.rank_pattern}" if peft_config.rank_pattern else ""
            raise ValueError(
                f"r={peft_config.r}{pattern} creates {num_entries:,} factor entries for {num_weights:,} adapted "
                "weights; choose a smaller rank, e.g. 8"
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Check for tied embeddings as PEFT does, but match expressions with a time limit."""
        targets = getattr(peft_config, "target_modules", None)
        # PEFT would match an expression without a time limit, so pass it the matching names instead
        if isinstance(targets, str) and targets.lower() != "all-linear":
            check_expression(targets, [name for name, _ in model.named_modules()])
            peft_config.target_modules = _matching_names(targets, model)  # type: ignore[attr-defined]
        try:
            super()._check_tied_modules(model, peft_config)
        finally:
            peft_config.target_modules = targets  # type: ignore[attr-defined]

    def _add_modules_to_save_to_tie(self, peft_config: SnellaConfig, tied_weight_keys: list[str]) -> None:
        """Of all tied modules, save only the input embedding, because PEFT ties the others to it."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        tied = set(tied_weight_keys)
        peft_config.modules_to_tie = tied  # type: ignore[attr-defined]
        others: list[str] = []
        for module_name in peft_config.modules_to_save or []:
            is_tied = any(has_suffix(key, module_name) for key in tied)
            if not is_tied:
                others.append(module_name)
        peft_config.modules_to_save = list(dict.fromkeys([*others, name]))

    def _add_targets_to_tie(self, peft_config: SnellaConfig, tied_weight_keys: list[str]) -> None:
        """Raise an error, because tied layers cannot share an update."""
        raise NotImplementedError(
            f"ensure_weight_tying=True does not support a target among the tied layers {sorted(tied_weight_keys)}: "
            "SNELLA adapts no embedding; train it with modules_to_save or trainable_token_indices"
        )

    def _add_output_projections(
        self, targets: set[str] | str, peft_config: SnellaConfig, model: nn.Module
    ) -> set[str] | str:
        """Add the output projections of all targeted torch attention modules to the targets.

        If there are any, a regular expression is replaced with the names that it matches.
        """
        resolved_config = copy.copy(peft_config)
        resolved_config.target_modules = targets
        outputs = {
            f"{name}.out_proj"
            for name, module in model.named_modules()
            if name and is_adaptable(module) and self._check_target_module_exists(resolved_config, name)
        }
        if not outputs:
            return targets
        if isinstance(targets, str):
            return _full_names(_matching_names(targets, model) | outputs, model)
        return targets | outputs

    def _reject_shared_weights(self, peft_config: SnellaConfig, model: nn.Module) -> None:
        """Reject targets that share one weight, and targets whose weight belongs to a module with several names."""
        for sharing in _shared_weights(model):
            targeted = [name for name, _ in sharing if self._check_target_module_exists(peft_config, name)]
            has_alias = len({id(base) for _, base in sharing}) < len(sharing)
            if targeted and (has_alias or len(targeted) > 1):
                raise NotImplementedError(
                    f"target_modules matches {targeted[0]!r}, but {[name for name, _ in sharing]} share one weight; "
                    "an update of one module would change or miss the others; exclude them, or give each its own weight"
                )

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Match as PEFT does, but with a time limit, and apply `layers_to_transform` even to full names of targets."""
        # modules inside an adapted attention module match under their original name
        key = key.replace(".base_layer.", ".")
        if not isinstance(peft_config, SnellaConfig):
            return check_target_module_exists(peft_config, key)
        # a copy without expressions, which PEFT would match without a limit, and without block indices (checked below)
        names_only = copy.copy(peft_config)
        names_only.layers_to_transform = None
        for field in ("target_modules", "exclude_modules"):
            if isinstance(expression := getattr(names_only, field), str):
                setattr(names_only, field, {key} if _matches(expression, key) else set())
        match = check_target_module_exists(names_only, key)
        layers = peft_config.layers_to_transform
        blocks = [layers] if isinstance(layers, int) else layers
        if match and blocks and block_number(key, peft_config.layers_pattern) not in blocks:
            return False
        return match

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model, which remains unchanged on failure."""
        children_before = [(module, dict(module._modules)) for module in model.modules()]
        flags_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with warnings.catch_warnings():
                # PEFT compares the keys with the targets, which do not list the input projections of attention modules
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for module, children in children_before:
                module._modules.clear()
                module._modules.update(children)
            for module in model.modules():
                if isinstance(module, SnellaLayer):
                    drop_adapter(module, adapter_name)
            for parameter, requires_grad in flags_before:
                parameter.requires_grad_(requires_grad)
            raise
        disable_fast_path(model)
        config = cast(SnellaConfig, self.peft_config[adapter_name])
        _update_marks(model)
        is_on_cpu = any(layer.snella_A[adapter_name].is_cpu for layer in _adapted_layers(model, [adapter_name]))
        if config.weight_gradient == "bfloat16" and is_on_cpu and not has_bfloat16_instructions():
            warnings.warn(
                "this processor has no bfloat16 instructions, so weight_gradient='bfloat16' slows training down; "
                "use 'exact'",
                stacklevel=2,
            )
        if not config.inference_mode:
            _warn_of_unmatched(config, self.model)
            find_layers = partial(_adapted_layers, adapter_names=[adapter_name])
            config.watch = TrainingWatch()  # the configuration may have been used for another model
            config.watch.start(self.model, adapter_name, find_layers, head_layers)
        attach_tokens(
            model,
            config.parameters_to_save or [],
            adapter_name,
            self.active_adapters,
            inference_mode=config.inference_mode,
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, or raise an error before any change if they cannot be active together."""
        tokens = token_adapters(self.model)
        for token in tokens:
            token.check_active(adapter_name)
        super().set_adapter(adapter_name, inference_mode)
        for token in tokens:
            token.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, PEFT activates another one."""
        super().delete_adapter(adapter_name)
        _update_marks(self.model)
        for token in token_adapters(self.model):
            token.delete_adapter(adapter_name)
            if token.active_adapters != self.active_adapters:  # PEFT has activated another adapter
                token.set_adapter(self.active_adapters)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast half-precision factors and scalars to float32, but keep tokens in the model's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for token in token_adapters(self.model):
            # a float32 token in a half-precision model would promote all later activations
            token._move_adapter_to_device_of_base_layer(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the updates to the base weights, and report all requantization errors in one warning.

        Raises:
            ValueError: See `SnellaLayer.merge` and `TokenAdapter.merge`.
            NotImplementedError: See `SnellaLayer.merge`; also if another module uses the base weight of an adapted
                layer.
        """
        self._check_merges(adapter_names)
        with combined_warning():
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """Let PEFT unload all layers, merged or not, then move tokens back and remove the hooks that mark outputs."""
        tokens = token_adapters(self.model)
        if kwargs.get("merge", not args or args[0]):  # PEFT's first parameter, True by default
            self._check_merges(**kwargs)
        with combined_warning():
            model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[assignment]
        for token in tokens:
            token.remove()
        unmark_outputs(model)
        return model

    def _check_merges(self, adapter_names: list[str] | None = None, **_: Any) -> None:
        """Reject unsafe merges before any layer changes, and warn if the model has never used some of the updates."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for token in token_adapters(self.model):
            token.check_active(list(dict.fromkeys([*token.merged_adapters, *names])))
        _reject_unsafe_merges(self.model)
        configs = [self.peft_config[name] for name in names if name in self.peft_config]
        warn_about_unused_merges(_adapted_layers(self.model, names), cast(list[SnellaConfig], configs))

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SnellaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt a target: a linear layer, a convolution, or the projections of a torch attention module."""
        if isinstance(parent, AdaptedAttention) and target_name != "out_proj":
            return  # the wrapped attention module, or a projection that is adapted together with it
        if isinstance(parent, (nn.MultiheadAttention, AdaptedAttention)) and target_name == "out_proj":
            self._adapt_output(peft_config, adapter_name, parent, current_key)
            return
        if is_adaptable(target):
            wrapper = self._wrap_attention(target, target_name, parent)
            for name in input_projections(wrapper.base_layer):
                self._adapt_projection(peft_config, adapter_name, wrapper, name, current_key)
            return
        if isinstance(target, BaseTunerLayer) and not isinstance(target, SnellaLayer):
            raise NotImplementedError(
                f"target_modules matches {current_key!r}, which already has an adapter, {class_name(target)}; SNELLA "
                "would discard its update; merge or unload it first"
            )
        base = target.get_base_layer() if isinstance(target, SnellaLayer) else target
        layer_cls = choose_layer_class(base, current_key)
        rows = count_rows(current_key, *matrix_shape(base), parent, peft_config.qkv_groups)
        if isinstance(target, SnellaLayer):
            target.update_layer(adapter_name, peft_config, rows)
            return
        layer = layer_cls(target, adapter_name, peft_config, rows, module_name=current_key)
        if adapter_name not in self.active_adapters:
            # an additional adapter trains only after activation
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _adapt_output(self, peft_config: SnellaConfig, adapter_name: str, parent: nn.Module, current_key: str) -> None:
        """Adapt the output projection of a torch attention module in a wrapper, because the module never calls it."""
        name = current_key.replace(".base_layer.", ".").rpartition(".")[0]
        if not name:
            raise NotImplementedError(
                f"target_modules matches {current_key!r}, but the model is an nn.MultiheadAttention, which can "
                "only be adapted inside another module; wrap it, e.g. in nn.ModuleDict"
            )
        attention = self.model.get_submodule(name)
        if not is_adaptable(attention):
            choose_layer_class(attention, name)  # raises an error, because the module has a custom `forward`
        attention_parent = self.model.get_submodule(name.rpartition(".")[0])
        wrapper = self._wrap_attention(attention, name.rpartition(".")[2], attention_parent)
        # an adapted output projection has two names here; adapt it only under its name in the wrapper
        if wrapper.find_projection("out_proj") is None or isinstance(parent, AdaptedAttention):
            self._adapt_projection(peft_config, adapter_name, wrapper, "out_proj", name)

    def _wrap_attention(self, attention: nn.Module, attention_name: str, parent: nn.Module) -> AdaptedAttention:
        """Return the wrapper of a torch attention module, created and inserted if necessary."""
        if isinstance(attention, AdaptedAttention):
            return attention
        wrapper = AdaptedAttention(cast(nn.MultiheadAttention, attention)).train(attention.training)
        self._replace_module(parent, attention_name, wrapper, attention)
        return wrapper

    def _adapt_projection(
        self, peft_config: SnellaConfig, adapter_name: str, wrapper: AdaptedAttention, name: str, attention_name: str
    ) -> None:
        """Add an adapter to one projection of a wrapped attention module."""
        full_name = f"{attention_name}.{name}"
        weight = ProjectionView(wrapper.base_layer, name).weight
        reject_quantized_projection(weight, full_name)
        rows = count_rows(full_name, weight.shape[0], weight.shape[1], wrapper, peft_config.qkv_groups)
        is_new = wrapper.adapt(name, adapter_name, peft_config, rows, full_name)
        if is_new and adapter_name not in self.active_adapters:
            # an additional adapter trains only after activation
            cast(Projection, wrapper.find_projection(name)).requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a child of `parent` while the tensors that accelerate has offloaded are loaded."""
        if isinstance(child, (AdaptedAttention, AuxiliaryTrainingWrapper)):
            # PEFT would copy a `weight`, which attention modules and heads with several layers lack
            setattr(parent, child_name, new_module)
            return
        # PEFT moves the factors to the base weight's current device
        off_meta = buffers_off_meta(new_module) if isinstance(new_module, SnellaLayer) else nullcontext()
        with onloaded(new_module, with_base=True), off_meta:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Raise an error, because one pair of factors cannot represent a sum of sparse updates.

        Raises:
            NotImplementedError: Always. The message describes an alternative.
        """
        raise NotImplementedError(
            f"add_weighted_adapter({adapters}, {weights}, {adapter_name!r}) is not supported: one pair of factors "
            f"cannot represent a sum of sparse updates; activate all with base_model.set_adapter({adapters}) and call "
            "layer.set_scale(name, weight) on every SnellaLayer; then merge to get one set of weights"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Reject per-sample adapters, which PEFT would silently ignore."""
        if adapter_names is not None:
            raise NotImplementedError(
                f"adapter_names={list(adapter_names)!r} is not supported: a batch cannot mix SNELLA adapters, because "
                "the update is part of the weight; run each adapter's samples as a separate batch after set_adapter, "
                "or use snella.TaskBank"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the entries as PEFT does, and check the adapter before it is saved.

        Runs the checks of `TrainingWatch.on_saving`, and records the layers that the model has not used in
        `SnellaConfig.unused_modules`. PEFT looks up entries by module name and removes only the leading
        `_fsdp_wrapped_module` from this name. FSDP1 and torch's checkpoint wrapper also insert such parts elsewhere in
        module names, but not in the keys of `state_dict`.

        Raises:
            ValueError: If no layer has the adapter, or `state_dict` has entries but no factor of the adapter. An empty
                `state_dict` is allowed, because FSDP gathers the weights on only one rank.
        """
        layers = _adapted_layers(model, [adapter_name])
        if not layers:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            raise ValueError(
                f"{type(base).__name__} has no layer with adapter {adapter_name!r}; save the adapter before "
                "merge_and_unload() or unload()"
            )
        names = (name.removeprefix("_fsdp_wrapped_module.") for name, _ in model.named_modules())
        module_names = {_without_wrappers(name): name for name in names}
        renamed = {}
        for name, tensor in state_dict.items():
            owner, _, leaf = name.rpartition(".")
            renamed[f"{module_names.get(owner, owner)}.{leaf}".removeprefix(".")] = tensor
        selected = super()._get_adapter_state_dict(model, config, adapter_name, renamed, unwanted_adapter_names)
        selected = {_without_wrappers(name): tensor for name, tensor in selected.items()}
        if state_dict and not any(f"{cls.prefix}A" in name for name in selected):
            raise ValueError(
                f"state_dict has {len(state_dict)} entries, e.g. {next(iter(state_dict))!r}, but no factor of adapter "
                f"{adapter_name!r}; pass the full state dict of the unwrapped model"
            )
        # the checks read the budgets
        if isinstance(config, SnellaConfig) and not any(layer.snella_budget[adapter_name].is_meta for layer in layers):
            config.watch.on_saving(model, layers, adapter_name)
            unused = [layer.module_name for layer in layers if not layer.is_applied]
            if len(unused) < len(layers):  # otherwise nothing has run here, and the field comes from another process
                config.unused_modules = unused or None
        return selected

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze parameters as PEFT does, except trained biases of adapted attention modules, which PEFT misses."""
        super()._mark_only_adapters_as_trainable(model)
        if any(getattr(self.peft_config[name], "bias", "none") != "none" for name in self.active_adapters):
            for name in _attention_biases(model):
                model.get_parameter(name).requires_grad_(True)

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: PeftConfig
    ) -> dict[str, Tensor]:
        """Select biases as PEFT does, and also those of adapted attention modules."""
        biases: dict[str, Tensor] = super()._get_learnable_bias_state_dict(model, state_dict, config)
        if getattr(config, "bias", "none") != "none":
            biases |= {name: state_dict[name] for name in _attention_biases(model) if name in state_dict}
        return biases

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Remap the keys as PEFT does, and reject tensors that do not fit this model.

        Raises:
            ValueError: If a tensor is missing, is unknown, has a different shape, or is not finite, or if a budget is
                invalid.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if not isinstance(module, (SnellaLayer, TokenAdapter)):
                continue
            for attribute in module.saved_names:
                tensors: Any = getattr(module, attribute)
                if adapter_name in tensors:
                    expected[f"{name}.{attribute}.{adapter_name}"] = tensors[adapter_name]
        errors = [f"{key} is missing" for key in expected if key not in remapped]
        errors += [
            f"{key} has shape {list(remapped[key].shape)}, the model needs {list(tensor.shape)}"
            for key, tensor in expected.items()
            if key in remapped and remapped[key].shape != tensor.shape
        ]
        errors += [f"{key} matches no layer" for key in remapped if ".snella_" in key and key not in expected]
        if errors:
            raise ValueError(
                f"the adapter does not fit {type(model).__name__}: {listed(errors, 3, '; ')}; "
                "load it into the architecture it was trained on"
            )
        nonfinite: list[str] = []
        for key in expected:
            values = remapped[key]
            num_nonfinite = int(values.numel() - torch.isfinite(values).sum())
            if num_nonfinite:
                nonfinite.append(f"{key} ({num_nonfinite} of {values.numel()})")
        if nonfinite:
            raise ValueError(
                f"the adapter contains non-finite values: {listed(nonfinite, 3)}; its training "
                "diverged or its file is corrupt; load an earlier checkpoint"
            )
        invalid = []
        for name, module in model.named_modules():
            if isinstance(module, SnellaLayer) and adapter_name in module.snella_A:
                budgets = remapped[f"{name}.snella_budget.{adapter_name}"].tolist()
                if (error := budget_error(module, adapter_name, budgets)) is not None:
                    invalid.append(f"budgets of {name!r} {error}")
        if invalid:
            raise ValueError(
                f"the adapter contains invalid budgets: {listed(invalid, 3, '; ')}; its file is corrupt; load an "
                "earlier checkpoint"
            )
        return remapped


def _update_marks(model: nn.Module) -> None:
    """Mark the outputs that adapted layers recompute instead of saving, unless an adapter disables this."""
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    configs = [layer.snella_config[name] for layer in layers for name in layer.snella_A]
    if not configs or not all(config.recompute_inputs for config in configs):
        unmark_outputs(model)
        return
    is_compressed = any(config.compress_activations for config in configs)
    num_marked = mark_outputs(model, compress=partial(_is_compressed, layers) if is_compressed else None)
    logger.info("recomputing inputs of adapted layers from %d normalizations and activations", num_marked)


def _is_compressed(layers: list[SnellaLayer]) -> bool:
    """Return whether all active adapters of these layers set `compress_activations`; False if none is active."""
    configs = [layer.snella_config.get(name) for layer in layers for name in layer.active_adapters]
    flags = [config.compress_activations for config in configs if config is not None]
    return bool(flags) and all(flags)


def _without_wrappers(name: str) -> str:
    """Remove the names of the wrapper modules of FSDP1 and of torch's checkpointing from a module name."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def _warn_of_unmatched(config: SnellaConfig, model: nn.Module) -> None:
    """Warn about names in `modules_to_save` that match no module."""
    names = [name for name, _ in model.named_modules()]
    added_by_peft = _HEADS_ADDED_BY_PEFT if config.task_type else ()
    expected = [name for name in config.modules_to_save or [] if name not in added_by_peft]
    if unmatched := [suffix for suffix in expected if not any(name.endswith(suffix) for name in names)]:
        warnings.warn(
            f"modules_to_save={unmatched} matches no module of {type(model).__name__}; "
            f"its top-level modules are {[name for name, _ in model.named_children()]}",
            stacklevel=2,
        )


def _adapted_layers(model: nn.Module, adapter_names: list[str]) -> list[SnellaLayer]:
    """Return the layers with at least one of these adapters."""
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    return [layer for layer in layers if any(name in layer.snella_A for name in adapter_names)]


def _check_token_rows(peft_config: SnellaConfig, model: nn.Module) -> None:
    """Reject names in `trainable_token_indices` that match no module, and rows outside a weight."""
    indices = peft_config.trainable_token_indices
    if not indices:
        return
    named_modules = model.named_modules(remove_duplicate=False)
    # the base layer of an embedding with an adapter has this suffix
    modules = {name.removesuffix(".token_adapter.base_layer"): module for name, module in named_modules}
    if not isinstance(indices, dict):
        get_input_embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
        input_embedding = get_input_embeddings()
        input_embedding = getattr(input_embedding, "original_module", input_embedding)
        matches = (name for name, module in modules.items() if module is input_embedding)
        embedding_name = next(matches, "embed_tokens")  # the default is PEFT's
        indices = {embedding_name: indices}
    # PEFT matches the ends of names
    if unmatched := [suffix for suffix in indices if not any(name.endswith(suffix) for name in modules)]:
        embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
        raise ValueError(
            f"trainable_token_indices requires a module {unmatched[0]!r}, which {type(model).__name__} lacks; map the "
            f"names of its embeddings, {embeddings}, to rows"
        )
    for name, module in modules.items():
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            continue
        rows = next((rows for suffix, rows in indices.items() if name.endswith(suffix)), [])
        num_rows = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
        if out_of_range := [row for row in rows if not 0 <= row < num_rows]:
            raise ValueError(
                f"trainable_token_indices must be in [0, {num_rows - 1}] for {name!r}, got {out_of_range[0]}"
            )


def _attention_biases(model: nn.Module) -> list[str]:
    """Return the names of the biases of adapted attention projections, which their attention modules own."""
    biases: dict[str, None] = {}  # an ordered set, because input projections share one bias
    for name, module in model.named_modules():
        for projection in module.projections() if isinstance(module, AdaptedAttention) else ():
            bias_name = projection.bias_name
            if bias_name is not None:
                biases[f"{_without_wrappers(name)}.base_layer.{bias_name}"] = None
    return list(biases)


def _shared_weights(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return, for each shared weight, a list with the name and base layer of every module that uses it."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if ".base_layer." in f"{name}.":  # already included under the name of the adapted layer
            continue
        parameters = {"weight": base.weight} if isinstance(base, ProjectionView) else base._parameters
        for parameter_name, parameter in parameters.items():
            if parameter is not None and "bias" not in parameter_name:
                users.setdefault(id(parameter), []).append((name, base))
    return [sharing for sharing in users.values() if len(sharing) > 1]


def _reject_unsafe_merges(model: nn.Module) -> None:
    """Before any change, reject merges that would be lost or would also change other modules with the same weight.

    The trained token rows of tied embeddings may be merged if all modules that use the weight train rows.
    """
    for layer in (module for module in model.modules() if isinstance(module, SnellaLayer)):
        check_parameter(layer)
    for sharing in _shared_weights(model):
        names = [name for name, _ in sharing]
        modules = [model.get_submodule(name) for name in names]
        adapted = [name for name, module in zip(names, modules, strict=True) if isinstance(module, BaseTunerLayer)]
        if adapted and (len(adapted) < len(names) or any(isinstance(module, SnellaLayer) for module in modules)):
            others = [name for name in names if name != adapted[0]]
            raise NotImplementedError(
                f"merging {adapted[0]!r} would also change {others}, which use the same weight; give each module its "
                "own weight before adding the adapter"
            )


def _matching_names(targets: set[str] | str, model: nn.Module) -> set[str]:
    """Return the names of the modules that match the targets."""
    return {name for name, _ in model.named_modules() if _matches(targets, name)}


def _full_names(names: set[str], model: nn.Module) -> set[str] | str:
    """Return full module names, or an expression for them if they are also suffixes of other names, as PEFT matches."""
    if _matching_names(names, model) == names:
        return names
    return "|".join(re.escape(name) for name in sorted(names))


def _matches(targets: set[str] | str, name: str) -> bool:
    """Return whether the targets match a module, ignoring exclusions."""
    if isinstance(targets, str):
        return matches_expression(targets, name)
    return any(has_suffix(name, target) for target in targets)

"""`SnellaLayer`: the forward passes of a layer whose weight carries sparse updates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snella.ops.custom_op import adapted_layer_in_graph
from snella.ops.fixed_support import fold_entries, layer_with_entries, merged_entries
from snella.ops.functional import adapted_layer
from snella.ops.spec import LayerOp, LinearOp, WeightOp
from snella.tuner.adapted_weight import AdaptedWeight
from snella.tuner.effective import EffectiveWeight


class SnellaLayer(AdaptedWeight):
    """One adapted weight and its product with an input, for any number of adapters.

    Base layer and updates are folded into one matrix product; an update with dropout on its input or drop-path on its
    output is a branch of its own in training.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer with the updates of all active adapters."""
        if torch.compiler.is_compiling():
            return self._forward_in_graph(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight with the updates of all active adapters, differentiable, for models that read it themselves.

        Base weight where it is quantised. Dropout and drop-path do not act on an update that is read.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.snella_A]
        base: Tensor = super().weight
        if self.disable_adapters or self.merged or not names or self.quantization is not None:
            return base
        if torch.compiler.is_compiling():
            return self._base_layout(self._read_in_graph(names))
        return EffectiveWeight.of(base, lambda: self._base_layout(self._read(names)))

    def _read(self, names: list[str]) -> Tensor:
        """`W0 + Σ scaling·S`, `[m, …]`; remembered in evaluation without gradients, as for a forward pass."""
        if not self._needs_gradients(names):
            return self._effective(self._weight(), names) if self.training else self._remembered_weight(names)
        self._observe_training(names)
        if any(self._is_regularised(name) for name in names) and self.training:
            self.snella_config[names[0]].watch.observe_read(self.module_name)
        self._cache.drop_effective_weight()
        weight = self._oriented_weight()
        with torch.autocast(weight.device.type, enabled=False):
            if any(name in self.snella_support for name in names):
                return fold_entries(weight, *self._entries(names))
            self._check_one_impl(names)
            return self._apply_updates(weight.new_empty(0), weight, None, names, WeightOp())

    def _read_in_graph(self, names: list[str]) -> Tensor:
        """The same for `torch.compile`: the product with the identity, which the compiler drops where it is unused."""
        if any(name in self.snella_support for name in names):
            return torch.compiler.disable(self._read)(names)
        weight = self._oriented_weight()
        matrix = weight.reshape(weight.shape[0], -1)
        with torch.autocast(weight.device.type, enabled=False):
            identity = torch.eye(matrix.shape[1], dtype=weight.dtype, device=weight.device)
            total = self._update_in_graph(identity, names[0], matrix, op=LinearOp(), shape=matrix.shape)
            for name in names[1:]:
                y = self._update_in_graph(identity, name, op=LinearOp(), shape=matrix.shape)
                total = total + y.to(total.dtype)
        return total.T.reshape(weight.shape)

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same for `torch.compile`: nothing is remembered between calls, since a graph cannot see what changed."""
        names = [name for name in self.active_adapters if name in self.snella_A]
        if self.quantization is None and (self.disable_adapters or self.merged or not names):
            return self.base_layer(x, *args, **kwargs)
        if self.quantization is not None or any(name in self.snella_support for name in names):
            return torch.compiler.disable(self._forward)(x, *args, **kwargs)
        weight, bias, dtype, product = self._oriented_weight(), self._base_tensor("bias"), x.dtype, self._product()
        x = self._prepare_input(self._cast_input_dtype(x, weight.dtype))
        is_autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type) if is_autocast else weight.dtype)
        bias = bias if bias is None else bias.to(x.dtype)
        branches = [name for name in names if self.training and self._is_regularised(name)]
        folded = [name for name in names if name not in branches]
        # the first folded update goes into the base weight, and the others come on top
        first, others = folded[:1], folded[1:]
        y = self._update_in_graph(x, first[0], weight, bias) if first else product(x, weight.to(x.dtype), bias)
        for name in others:
            y = y + self._update_in_graph(x, name).to(y.dtype)
        for name in branches:
            source = F.dropout(x, self._update_dropout(name), training=True)
            y = y + self._drop_path(self._update_in_graph(source, name), name).to(y.dtype)
        return y if is_autocast else y.to(dtype)

    def _update_in_graph(
        self,
        x: Tensor,
        name: str,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        op: LayerOp | None = None,
        shape: torch.Size | None = None,
    ) -> Tensor:
        """The layer op with one update, and the base weight or without it."""
        spec, factors, budgets = self._spec(name), self._factors(name), self.snella_budget[name]
        shape = self._weight().shape if shape is None else shape
        return adapted_layer_in_graph(x, weight, bias, spec, factors, budgets, op or self._product(), shape)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass outside of graphs; remembers thresholds and, in evaluation, the effective weight."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._without_updates(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.snella_A]
        if self.merged or not names:
            return self._without_updates(x, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._observe_training(names)
        branches = [name for name in names if self.training and self._is_regularised(name)]
        folded = [name for name in names if name not in branches]
        dtype = x.dtype
        x = self._prepare_input(self._cast_input_dtype(x, self._dtype_of_product(x)))
        y = self._folded(x, folded)
        for name in branches:
            y = y + self._branch(x, name).to(y.dtype)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer as it is."""
        if self.quantization is None or self.quantization.is_safe_to_apply(self.get_base_layer()):
            return self.base_layer(x, *args, **kwargs)
        wide = self._prepare_input(self._cast_input_dtype(x, self._dtype_of_product(x)))
        y, _ = adapted_layer(wide, self._weight(), self._base_tensor("bias"), [], self._product())
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _dtype_of_product(self, x: Tensor) -> torch.dtype:
        """The dtype that this layer computes in, autocast aside."""
        if self.quantization is None:
            return self._base_tensor("weight").dtype
        return self.quantization.product_dtype(self.get_base_layer(), x.dtype)

    def _observe_training(self, names: list[str]) -> None:
        """Let the watch of each adapter that is to become sparser know that it is being trained."""
        for name in names:
            config = self.snella_config[name]
            becomes_sparser = config.target_sparsity > config.init_sparsity and not config.fixed_support
            if becomes_sparser and self.snella_A[name].requires_grad:
                config.watch.observe_training(config.target_sparsity)

    def _folded(self, x: Tensor, names: list[str]) -> Tensor:
        """Base layer and updates in one product, whose weight evaluation remembers unless the base is quantised."""
        bias, product = self._base_tensor("bias"), self._product()
        if names and not self.training and not self._needs_gradients(names):
            is_autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
            return adapted_layer(x, self._weight_in_evaluation(names, dtype), bias, [], product)[0]
        self._cache.drop_effective_weight()
        if any(name in self.snella_support for name in names):
            return self._folded_on_support(x, names)
        self._check_one_impl(names)
        return self._apply_updates(x, self._weight(), bias, names, product)

    def _folded_on_support(self, x: Tensor, names: list[str]) -> Tensor:
        """Base layer and the update of one adapter with a fixed support."""
        weight, bias = self._weight(), self._base_tensor("bias")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif isinstance(weight, Tensor):
            x = x.to(weight.dtype)
        values, indices = self._entries(names)
        return layer_with_entries(
            x, weight, None if bias is None else bias.to(x.dtype), values, indices, self._product()
        )

    def _entries(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Values and positions of the one adapter with a fixed support.

        Raises:
            NotImplementedError: Other adapters are active besides it.
        """
        if len(names) > 1:
            raise NotImplementedError(
                f"adapters {names} cannot be trained together, as the support of "
                f"{[name for name in names if name in self.snella_support]} is fixed; activate one"
            )
        indices = self._cache.positions(names[0], self.snella_support[names[0]])
        return merged_entries(self._spec(names[0]), self._factors(names[0]), indices), indices

    def _branch(self, x: Tensor, name: str) -> Tensor:
        """The update alone, with dropout on its input and drop-path on its output."""
        x = F.dropout(x, self._update_dropout(name), training=True)
        return self._drop_path(self._apply_updates(x, None, None, [name], self._product()), name)

    def _drop_path(self, y: Tensor, name: str) -> Tensor:
        """Leave the update out for whole samples, and scale the others up."""
        rate = self.snella_config[name].update_drop_path or 0.0
        if rate == 0:
            return y
        keep = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) >= rate
        return y * keep.to(y.dtype) / (1 - rate)

    def _is_regularised(self, name: str) -> bool:
        """Whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
        return bool(self._update_dropout(name) or self.snella_config[name].update_drop_path)

    def _update_dropout(self, name: str) -> float:
        """Dropout on the update's input in this very layer."""
        config = self.snella_config[name]
        excluded = any(
            self.module_name == s or self.module_name.endswith(f".{s}") for s in config.dropout_exclude or []
        )
        return 0.0 if excluded else config.update_dropout or 0.0

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can fit the update: only of linear layers, the kind that it knows."""
        return False


__all__ = ["SnellaLayer"]

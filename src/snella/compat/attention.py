"""Support for `nn.MultiheadAttention`.

Its `forward` reads the weights of the projections instead of calling them as layers, so an adapter must wrap the whole
attention module. An effective weight is a pre-trained weight plus the updates of the active adapters.
"""

from __future__ import annotations

from contextlib import ExitStack
from operator import attrgetter
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from snella.compat.hooks import (
    NO_DATA_PARALLEL,
    call_inside_hooks,
    has_hooks,
    hook_dicts,
    is_hooked_in_graph,
    onloaded,
    replacement_lock,
)
from snella.config import SnellaConfig
from snella.layer import SnellaLayer, needs_gradients, reject_tracing

# used instead of `in_proj` if keys or values have a different width than queries
_SEPARATE_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_OUTPUT = "out_proj"


class AdaptedAttention(nn.Module):
    """Wrapper for an `nn.MultiheadAttention` with adapted projections.

    The pre-trained parameters remain in the attention module. Each adapted projection is a child of the wrapper:
    `out_proj`, and either `in_proj`, which stacks three matrices, or `q_proj`, `k_proj`, and `v_proj`.

    The wrapper applies the projections separately, with scaled dot-product attention in between, in three cases: in
    training mode, when gradients are required, and in a compiled graph. Autograd then need not save the effective
    weights for the backward pass. Otherwise, the wrapper calls the `forward` of the attention module with the effective
    weights. This keeps the fast path of `nn.MultiheadAttention`, and the outputs are bit-identical to those of the
    merged model. If weights cannot be replaced for a call (FSDP1, a replaced `forward`), the wrapper always applies the
    projections separately.

    Other attributes (`num_heads`, `batch_first`, …) are looked up in the attention module. A weight such as
    `in_proj_weight` includes the updates, because some models read it directly.

    Args:
        base_layer: Attention module to wrap.
    """

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._base_hook_dicts = hook_dicts(base_layer)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the attention module. The weights of adapted projections include the updates."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise  # if it is not set yet, the lookup below would recurse
            if name.endswith("_weight"):
                projection = self._modules.get(name.removesuffix("_weight"))
                if isinstance(projection, Projection):
                    return projection.weight
            return getattr(self.base_layer, name)

    def projections(self) -> list[Projection]:
        """Return the adapted projections."""
        return [child for child in self.children() if isinstance(child, Projection)]

    def find_projection(self, name: str) -> Projection | None:
        """Return the projection with this name, or `None` if it is not adapted."""
        child = self._modules.get(name)
        return child if isinstance(child, Projection) else None

    def adapt(
        self, name: str, adapter_name: str, config: SnellaConfig, row_counts: tuple[int, ...], module_name: str
    ) -> bool:
        """Add an adapter to one projection.

        Args:
            name: `in_proj`, `q_proj`, `k_proj`, `v_proj`, or `out_proj`.
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            row_counts: Number of rows of each matrix in the projection's weight.
            module_name: Full name of the projection.

        Returns:
            True if this is the projection's first adapter.
        """
        existing = self.find_projection(name)
        if existing is not None:
            existing.update_layer(adapter_name, config, row_counts)
            return False
        base = cast(nn.Module, ProjectionView(self.base_layer, name))
        projection = Projection(base, adapter_name, config, row_counts, module_name=module_name)
        setattr(self, name, projection.train(self.training))
        return True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `nn.MultiheadAttention.forward` with the updates of all active adapters."""
        options = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        updated = [projection for projection in self.projections() if projection._names_in_use()]
        if not updated:
            return self.base_layer(query, key, value, **options)
        if torch.compiler.is_compiling():
            # apply the projections separately, because a graph cannot detect an outdated effective weight
            if is_hooked_in_graph(self.base_layer, self._base_hook_dicts):
                return self._attend_outside_graphs(query, key, value, **options)
            return self._attend(query, key, value, **options)
        reject_tracing(updated[0].module_name)
        if any(projection.training for projection in updated):
            return self._attend_inside_hooks(query, key, value, **options)
        # `functional_call` temporarily replaces the parameters, which other threads share
        with replacement_lock:
            # `functional_call` cannot replace the plain tensors that FSDP1 uses during a pass, and hooks that replace
            # `forward` may load different tensors
            is_replaceable = "forward" not in self.base_layer.__dict__ and all(
                isinstance(projection.get_base_layer().weight, nn.Parameter) for projection in updated
            )
            if not is_replaceable or any(needs_gradients(p, p._names_in_use()) for p in updated):
                return self._attend_inside_hooks(query, key, value, **options)
            effective_weights = {projection.parameter_name: projection.inference_weight() for projection in updated}
            return functional_call(self.base_layer, effective_weights, (query, key, value), options)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Reject `nn.DataParallel`, whose replicas would all use the weights on the first device."""
        raise NotImplementedError(NO_DATA_PARALLEL)

    @torch.compiler.disable
    def _attend_outside_graphs(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Run `_attend_inside_hooks` outside compiled graphs."""
        return self._attend_inside_hooks(*inputs, **options)

    def _attend_inside_hooks(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Run `_attend` inside the hooks of the attention module, if it has any."""
        if not has_hooks(self.base_layer):
            return self._attend(*inputs, **options)

        def forward(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
            with ExitStack() as stack:
                for projection in self.projections():
                    stack.enter_context(onloaded(projection, with_base=True))
                return self._attend(*inputs, **options)

        output: tuple[Tensor, Tensor | None] = call_inside_hooks(self.base_layer, forward, *inputs, **options)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the input projections, the attention, and the output projection as separate operations."""
        base = self.base_layer
        is_batched = query.dim() == 3
        is_self_attention = query is key and key is value
        is_key_value_shared = key is value

        def to_batch_first(x: Tensor) -> Tensor:
            """Move the batch axis of `x` to the front, or add a batch axis if there is none."""
            if not is_batched:
                return x[None]
            return x if base.batch_first else x.transpose(0, 1)

        # inputs that are the same tensor must stay the same tensor, so that `_project` can detect this
        query = to_batch_first(query)
        key = query if is_self_attention else to_batch_first(key)
        value = key if is_key_value_shared else to_batch_first(value)
        projected = self._project(query, key, value)
        output, weights = _apply_attention(base, *projected, **options)
        output = self._projection("out_proj")(output)
        if not is_batched:
            weights = weights if weights is None else weights[0]
            return output[0], weights
        if not base.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the projected queries `[N, L, E]`, and keys and values `[N, S, E]`."""
        if not self.base_layer._qkv_same_embed_dim:
            inputs = zip(_SEPARATE_PROJECTIONS, (query, key, value), strict=True)
            return [self._projection(name)(x) for name, x in inputs]
        project = self._projection("in_proj")
        if query is key and key is value:
            return list(project(query).chunk(3, dim=-1))
        # `in_proj` applies all three matrices to each input, so keep only the output that is needed for that input
        queries = project(query).chunk(3, dim=-1)[0]
        key_chunks = project(key).chunk(3, dim=-1)
        values = key_chunks[2] if value is key else project(value).chunk(3, dim=-1)[2]
        return [queries, key_chunks[1], values]

    def _projection(self, name: str) -> Projection | ProjectionView:
        """Return the projection with this name, adapted or not."""
        return self.find_projection(name) or ProjectionView(self.base_layer, name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """Return the attention module; merge its projections first if `merge` is true.

        PEFT calls this method to unload a module.
        """
        for projection in self.projections():
            if merge:
                projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


class ProjectionView:
    """Linear-layer view of one projection of an attention module, with its current weight and bias.

    This class is not a module; otherwise, the state dict would contain the attention module again under each
    projection.

    Args:
        attention: Attention module that owns the weight and bias.
        name: `in_proj`, `q_proj`, `k_proj`, `v_proj`, or `out_proj`.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        self.attention = attention
        self.name = name

    @property
    def parameter_name(self) -> str:
        """Name of the weight in the attention module."""
        return "out_proj.weight" if self.name == _OUTPUT else f"{self.name}_weight"

    @property
    def weight(self) -> nn.Parameter:
        """Weight of the projection, `[m, n]`."""
        return cast(nn.Parameter, attrgetter(self.parameter_name)(self.attention))

    @property
    def bias(self) -> Tensor | None:
        """Bias of the projection, `[m]`, or `None` if there is none."""
        if self.name == _OUTPUT:
            return self.attention.out_proj.bias
        bias = self.attention.in_proj_bias
        if bias is None or self.name not in _SEPARATE_PROJECTIONS:
            return bias
        width = self.attention.embed_dim
        index = _SEPARATE_PROJECTIONS.index(self.name)
        return bias[index * width : (index + 1) * width]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the projection without updates."""
        return nn.functional.linear(x, self.weight, self.bias)


class Projection(SnellaLayer):
    """Adapted projection of an attention module."""

    @property
    def parameter_name(self) -> str:
        """Name of the weight in the attention module."""
        return cast(ProjectionView, self.base_layer).parameter_name

    @property
    def bias_name(self) -> str | None:
        """Name of the bias in the attention module, or `None`. All input projections share one bias."""
        projection = cast(ProjectionView, self.base_layer)
        if projection.bias is None:
            return None
        return "out_proj.bias" if projection.name == _OUTPUT else "in_proj_bias"

    def weight_name(self, name: str) -> str:
        """Return the adapted parameter's name in the model without adapters, given this projection's name."""
        return f"{name.rpartition('.')[0]}.{self.parameter_name}"

    def inference_weight(self) -> Tensor:
        """Return the cached effective weight for a pass without gradients, and set `is_applied`."""
        self.is_applied = True
        return self._cached_weight(self._names_in_use())

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


def input_projections(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    """Return the names of the query, key, and value projections: one name if they are fused, three if not."""
    return ("in_proj",) if attention._qkv_same_embed_dim else _SEPARATE_PROJECTIONS


def is_adaptable(module: nn.Module) -> bool:
    """Return whether a module is an `AdaptedAttention`, or an `nn.MultiheadAttention` with the original `forward`."""
    if isinstance(module, AdaptedAttention):
        return True
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def disable_fast_path(model: nn.Module) -> None:
    """Disable the fast path of torch's encoder layers that contain adapted layers.

    In evaluation mode, `nn.TransformerEncoderLayer` passes the weights of all its submodules to one fused function,
    which ignores updates. A hook on any submodule disables this path. The hook is removed together with its adapted
    layer.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for submodule in layer.modules():
                if isinstance(submodule, SnellaLayer) and not submodule._forward_pre_hooks:
                    submodule.register_forward_pre_hook(no_op_hook)


def no_op_hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Do nothing; the presence of this hook disables the fast path of `nn.TransformerEncoderLayer`."""


def _apply_attention(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute scaled dot-product attention of projected queries `[N, L, E]`, keys `[N, S, E]`, and values `[N, S, E]`.

        w = softmax(q kᵀ / √d + mask),   output = dropout(w) v          for each head of width d

    The options are as in `nn.MultiheadAttention.forward`: `key_padding_mask` is `[N, S]`, and `attn_mask` is
    `[L, S]` or `[N·heads, L, S]`. Entries of `True` or minus infinity mask a key.

    Raises:
        ValueError: If `is_causal` is set without `attn_mask`.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True requires the causal attn_mask, got attn_mask=None")
    num_heads = attention.num_heads
    batch, length = query.shape[:2]
    only_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if only_causal else _combine_masks(attn_mask, key_padding_mask, batch, num_heads, query.dtype)
    # if there is a mask, it gets zeros for the keys that are appended below, which are not masked
    if attention.bias_k is not None and attention.bias_v is not None:
        key = torch.cat([key, attention.bias_k.to(key.dtype).expand(batch, 1, -1)], dim=1)
        value = torch.cat([value, attention.bias_v.to(value.dtype).expand(batch, 1, -1)], dim=1)
        mask = mask if mask is None else F.pad(mask, (0, 1))
    if attention.add_zero_attn:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        mask = mask if mask is None else F.pad(mask, (0, 1))
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    dropout = attention.dropout if attention.training else 0.0
    if not need_weights:
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=only_causal)
        return output.transpose(1, 2).flatten(2), None
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1), dropout)
    output = (weights @ value).transpose(1, 2).reshape(batch, length, -1)
    return output, weights.mean(1) if average_attn_weights else weights


def _combine_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Combine both masks into an additive mask `[N or 1, heads or 1, L or 1, S]`; return `None` if there are none."""
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        if mask.dim() == 2:  # shared by all samples and heads
            masks.append(mask[None, None])
        else:
            masks.append(mask.view(batch, num_heads, *mask.shape[1:]))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, dtype).view(batch, 1, 1, -1))
    return sum(masks[1:], start=masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to an additive mask, and cast any other mask to `dtype`."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)

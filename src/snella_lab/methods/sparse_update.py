"""Method `gps-k` (gradient-based parameter selection, GPS), and layers with sparse updates, which `spt` also uses.

A sparse update adds trained values to selected entries of a frozen weight. Entries are addressed by their positions in
the flattened weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snella.backends import store_gradients, zero_gradients
from snella.config import SnellaConfig
from snella.kernels import Factors
from snella.ops import Conv2dOp, LayerOp, LinearOp, pad_input, without_view
from snella.update import UpdateSpec, init_factors
from snella_app.methods.method import Batches, Method, Options, SelectionData, check_by, integer, number, one_of
from snella_app.methods.model_parts import is_inside, recorded_inputs
from snella_app.methods.partial import train_head
from snella_lab.methods.calibration import Loss, loss_of, selection_data, summed_gradients


def layer_with_entries(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, op: LayerOp
) -> Tensor:
    """Apply a layer with `values` added to selected entries of its weight.

        y = op(x, W) + bias,   W = weight, W[indices[k]] += values[k]

    The backward pass recomputes `W` from the frozen weight and the values.

    Args:
        x: Input of the layer, in the compute dtype.
        weight: Weight before the addition, `[m, …]`.
        bias: `[m]` or None.
        values: Differentiable values, `[K]`.
        indices: Unique integer positions in the flattened weight, `[K]`.
        op: Op of the layer; see `snella.ops`.
    """
    return _LayerWithEntries.apply(x, weight, bias, values, indices, op)


def fold_entries(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return `weight` with `values` added at the flat positions `indices`, rounding each sum once."""
    flat = weight.reshape(-1)
    positions = indices.long()
    sums = (flat[positions].to(values.dtype) + values).to(weight.dtype)
    return flat.index_put((positions,), sums).view(weight.shape)


class _LayerWithEntries(torch.autograd.Function):
    """`op(x, fold_entries(weight, values, indices)) + bias`, without saving the effective weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, op: LayerOp
    ) -> Tensor:
        ctx.op = op
        ctx.x_shape = x.shape
        ctx.has_bias = bias is not None
        # only the gradients of the weight and of the values, of which there may be none, depend on x
        saves_x = ctx.needs_input_grad[1] or (ctx.needs_input_grad[3] and len(values))
        ctx.save_for_backward(x if saves_x else None, weight, values, indices)
        with torch.autocast(x.device.type, enabled=False):
            effective = fold_entries(weight, values, indices).to(x.dtype)
            return without_view(op(x, effective, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
        op: LayerOp = ctx.op
        grad_x = grad_weight = grad_bias = grad_values = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if needs_x:
                effective = fold_entries(weight, values, indices).to(grad_y.dtype)
                grad_x = op.grad_input(grad_y, effective, ctx.x_shape)
                del effective
            if needs_bias and ctx.has_bias:
                grad_bias = op.grad_bias(grad_y)
            if x is not None:
                # a dense product; computing only the selected entries is slower unless there are very few
                grad_weight = op.grad_weight(grad_y, x, weight.shape)
            if needs_values:
                grad_values = torch.zeros_like(values)
                if grad_weight is not None:
                    grad_values.copy_(grad_weight.reshape(-1)[indices.long()])
        grad_weight = grad_weight.to(weight.dtype) if needs_weight and grad_weight is not None else None
        return grad_x, grad_weight, grad_bias, grad_values, None, None


class SparseLayer(nn.Module, ABC):
    """`Linear` or `Conv2d` layer with an update of individual weights.

    y = op(x, W) + bias,   W = W0, W[indices[k]] += entries()[k]

    Autograd does not save `W`, so the backward pass recomputes it from the frozen weight and the entries. Gradients
    flow to the input, the entries, and, if it is trainable, the bias.

    Args:
        base_layer: Frozen layer.
        indices: Positions in the flattened weight, strictly ascending.

    Attributes:
        saved_buffers: Names of the buffers that are saved with the trained parameters.

    Raises:
        TypeError: If the layer is not a `Linear` or `Conv2d`, or overrides the forward pass.
        ValueError: If positions are out of range, repeated, unsorted, or not one-dimensional.
    """

    saved_buffers: tuple[str, ...] = ("indices",)
    base_layer: nn.Linear | nn.Conv2d
    indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Tensor) -> None:
        super().__init__()
        if not can_be_sparse(base_layer):
            raise TypeError(
                f"base_layer must be a torch.nn.Linear or Conv2d with the original forward pass, got {type(base_layer)}"
            )
        weight = base_layer.weight
        size = weight.numel()
        is_ascending = indices.ndim == 1 and bool((indices[1:] > indices[:-1]).all())
        if not is_ascending or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < size):
            raise ValueError(
                f"indices must be one-dimensional, strictly ascending positions in [0, {size}), got {indices}"
            )
        self.base_layer = base_layer
        self.register_buffer("indices", indices.to(weight.device, torch.int32))

    @abstractmethod
    def entries(self) -> Tensor:
        """Return the differentiable values to add to the weight at `indices`, in float32 or higher precision."""

    def sparse_entries(self) -> tuple[Tensor, Tensor]:
        """Return the int64 positions in the flattened weight, and the values, for `snella export`."""
        return self.indices.long(), self.entries().detach().clone()

    @property
    def weight(self) -> Tensor:
        """Differentiable effective weight `W`, for models that read the weight directly."""
        return fold_entries(self.base_layer.weight, self.entries(), self.indices)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the layer."""
        return self.base_layer.bias

    @property
    def layer_op(self) -> LayerOp:
        """Op of the base layer; see `snella.ops`."""
        return Conv2dOp.of(self.base_layer) if isinstance(self.base_layer, nn.Conv2d) else LinearOp()

    def __getattr__(self, name: str) -> Any:
        """Delegate missing attributes, e.g. `in_features`, to the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):  # copying looks up __deepcopy__ before base_layer exists
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def prepare_input(self, x: Tensor) -> Tensor:
        """Pad the input unless the padding mode is zeros, and cast it to the autocast dtype if autocast is enabled."""
        x = pad_input(self.base_layer, x)
        device_type = x.device.type
        return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with the trained entries added to its weight."""
        base = self.base_layer
        x = self.prepare_input(x)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return layer_with_entries(x, base.weight, bias, self.entries(), self.indices, self.layer_op)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Merge the entries into the base layer and return it.

        If the weight is contiguous, the outputs are bit-identical to those of this layer.
        """
        self.base_layer.weight.copy_(self.weight)
        return self.base_layer

    def extra_repr(self) -> str:
        """Return the number of entries and the size of the weight."""
        return f"{len(self.indices)} of {self.base_layer.weight.numel()} weights"


class SparseUpdate(SparseLayer):
    """`SparseLayer` that trains its entries directly.

    The saved adapter contains the values and their int32 positions: `2·len(indices)` numbers, as many as AdamW's state
    for the values.
    """

    def __init__(self, base_layer: nn.Module, indices: Tensor) -> None:
        super().__init__(base_layer, indices)
        dtype = torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=self.indices.device))

    def entries(self) -> Tensor:
        """Return the trained values."""
        return self.values


class MaskedUpdate(SparseLayer):
    """`SparseLayer` with entries `scaling · ΔW[indices]`, where ΔW is the matrix that SNELLA merges from two factors.

    Args:
        base_layer: Frozen layer.
        indices: Positions in the flattened weight, strictly ascending.
        config: Kernel, rank, scaling, and initialization.
        row_counts: Number of rows of each matrix in the weight.
        name: Layer name, which determines the rank.
    """

    def __init__(
        self, base_layer: nn.Module, indices: Tensor, config: SnellaConfig, row_counts: tuple[int, ...], name: str
    ) -> None:
        super().__init__(base_layer, indices)
        self.spec = UpdateSpec(config.make_kernel(), row_counts, scaling=config.scaling)
        weight = self.base_layer.weight
        num_matrices = len(row_counts)
        num_rows = len(weight)
        num_columns = weight[0].numel()
        r = config.rank_of(name)
        shapes: dict[str, tuple[int, ...]] = {"A": (num_matrices, num_columns, r), "B": (num_rows, r)}
        for scalar in self.spec.kernel.scalars:
            if scalar == "piece_coeff":
                shapes[scalar] = (num_matrices, config.num_pieces)
            elif scalar != "temperature" or config.learn_temperature:
                shapes[scalar] = (num_matrices,)
        self.factors = nn.ParameterDict(
            {key: nn.Parameter(torch.empty(shape, device=weight.device)) for key, shape in shapes.items()}
        )
        init_factors(self.current_factors(), self.spec.rows, config.num_pieces, is_larger=not config.init_weights)
        if "piece_coeff" in shapes and not config.learn_piece_coeff:
            self.factors["piece_coeff"].requires_grad_(False)

    def current_factors(self) -> Factors:
        """Return the factors and scalars."""
        return Factors(**self.factors)

    def entries(self) -> Tensor:
        """Return `scaling · ΔW[indices]`."""
        return merged_entries(self.spec, self.current_factors(), self.indices)


def merged_entries(spec: UpdateSpec, factors: Factors, indices: Tensor) -> Tensor:
    """Return entries of `scaling·ΔW` without saving a dense matrix for the backward pass.

        values[k] = scaling · ΔW[i, j],   indices[k] = i·n + j

    Args:
        spec: Kernel, rows, and scaling; the mode and the backend are ignored.
        factors: Factors and scalars; the result is differentiable with respect to them.
        indices: Positions in the flattened `[m, n]` matrix, ascending, on the factors' device.
    """
    return _MergedEntries.apply(spec, indices, *factors)


def _positions(spec: UpdateSpec, columns: int, indices: Tensor) -> list[tuple[slice, Tensor]]:
    """Return, for each matrix, its slice of `indices` and the positions within the matrix."""
    starts = torch.tensor([rows.start * columns for rows in spec.rows] + [spec.num_rows * columns])
    bounds: Sequence[int] = torch.searchsorted(indices, starts.to(indices)).tolist()
    return [
        (slice(start, stop), indices[start:stop].long() - int(offset))
        for start, stop, offset in zip(bounds[:-1], bounds[1:], starts[:-1].tolist(), strict=True)
    ]


class _MergedEntries(torch.autograd.Function):
    """`scaling·ΔW[indices]`, with a backward pass that recomputes ΔW in the kernel's `vjp`."""

    @staticmethod
    def forward(ctx: Any, spec: UpdateSpec, indices: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.spec = spec
        factors = Factors(*tensors)  # type: ignore[arg-type]
        ctx.save_for_backward(indices, *tensors)
        positions_by_matrix = _positions(spec, factors.A.shape[1], indices)
        entries_by_matrix = [
            spec.merge_matrix(matrix).flatten()[positions]
            for matrix, (_, positions) in zip(spec.matrices(factors), positions_by_matrix, strict=True)
        ]
        return torch.cat(entries_by_matrix) * spec.scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        indices, *tensors = ctx.saved_tensors
        spec = ctx.spec
        factors = Factors(*tensors)
        grads = zero_gradients(factors)
        matrices = zip(spec.matrices(factors), spec.rows, _positions(spec, factors.A.shape[1], indices), strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            for index, (matrix, rows, (entry_slice, positions)) in enumerate(matrices):
                if not len(positions):
                    continue
                dense_grad = torch.zeros(len(matrix.B), len(matrix.A), dtype=matrix.A.dtype, device=grad.device)
                dense_grad.view(-1)[positions] = (grad[entry_slice] * spec.scaling).to(dense_grad.dtype)
                store_gradients(grads, index, rows, spec.kernel.vjp(*matrix, dense_grad))
        needed = ctx.needs_input_grad[2:]
        tensor_grads = [g if is_needed else None for g, is_needed in zip(grads, needed, strict=True)]
        return None, None, *tensor_grads


class SparseEntries(nn.Module):
    """Parametrization (`torch.nn.utils.parametrize`) that adds trainable values to entries of a frozen vector.

    v = v0, v[indices[k]] += values[k]

    Args:
        vector: Frozen parameter.
        indices: Positions in the vector, strictly ascending.
    """

    saved_buffers = ("indices",)
    indices: Tensor

    def __init__(self, vector: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices.to(vector.device, torch.int32))
        self.values = nn.Parameter(
            vector.new_zeros(len(indices), dtype=torch.promote_types(vector.dtype, torch.float32))
        )

    def forward(self, vector: Tensor) -> Tensor:
        """Add the trained values to the vector."""
        return fold_entries(vector, self.values, self.indices)


def can_be_sparse(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Return True if a `SparseLayer` can wrap the module: a `Linear` or `Conv2d` with the original forward pass."""
    if isinstance(module, nn.Conv2d):
        conv_type = type(module)
        return conv_type.forward is nn.Conv2d.forward and conv_type._conv_forward is nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def require_sparse(model: nn.Module, names: Iterable[str], head: str) -> list[str]:
    """Return those of the given names whose layers a `SparseLayer` can wrap.

    Raises:
        ValueError: If there are no such layers, or the model already has a `SparseLayer`.
    """
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} already has sparse layers; apply a method only once, to a fresh backbone"
        )
    supported = [name for name in names if can_be_sparse(model.get_submodule(name))]
    if not supported:
        raise ValueError(
            f"{type(model).__name__} has no Linear or Conv2d layer with the original forward pass besides its head "
            f"{head!r}"
        )
    return supported


def merge_sparse(model: nn.Module) -> nn.Module:
    """Merge every `SparseLayer` and replace it with its base layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLayer):
            model.set_submodule(name, module.merged())
    return model


def stored_indices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the positions that a saved adapter contains, by layer name."""
    return {name.removesuffix(".indices"): value for name, value in tensors.items() if name.endswith(".indices")}


_RULES = {
    "k": integer(),
    "selection_loss": one_of("contrastive", "task"),
    "temperature": number(0.001),
    "calibration_batches": integer(),
}


def neuron_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of the layers that GPS adapts: every `Linear` and `Conv2d` except the head.

    The patch embedding is included. Layers with a custom forward pass remain frozen. So does the output projection of
    `nn.MultiheadAttention`, because the attention module reads the weight without calling the layer.

    Raises:
        ValueError: See `require_sparse`.
    """
    attention_names = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    frozen_parts = [head, *attention_names]
    names: list[str] = []
    for name, _ in model.named_modules():
        if not any(is_inside(name, part) for part in frozen_parts):
            names.append(name)
    return require_sparse(model, names, head)


def strongest_inputs(gradient: Tensor, k: int) -> Tensor:
    """Return the positions of each neuron's `k` largest gradient magnitudes.

    A neuron is a row of the weight reshaped to `[m, n]`. Ties go to the earlier inputs.

    Args:
        gradient: Gradient of the weight, `[m, ...]`.
        k: Number of inputs per neuron, clipped to n.

    Returns:
        Ascending int64 positions in the flattened weight, `[m · min(k, n)]`.
    """
    magnitude = gradient.reshape(len(gradient), -1).abs()
    columns = magnitude.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    rows = torch.arange(len(magnitude), device=gradient.device)[:, None]
    return (rows * magnitude.shape[1] + columns).flatten()


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Compute the supervised contrastive loss of features `[n, width]` with labels `[n]`.

    loss = mean_i( -1/|P(i)| Σ_{p in P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) ) ),   z = features/‖features‖

    `P(i)` contains the other features with the same class as `i`. The mean skips features with an empty `P(i)`. The
    loss is 0 if no two features share a class.

    Source: Khosla et al., arXiv 2004.11362, eq. 2.
    """
    z = F.normalize(features.float(), dim=1)
    is_self = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probs = (z @ z.T / temperature).masked_fill(is_self, -torch.inf).log_softmax(dim=1)
    is_positive = (labels[:, None] == labels[None, :]) & ~is_self
    num_positives = is_positive.sum(dim=1)
    # the minimum of 1 avoids 0 / 0
    means = -log_probs.masked_fill(~is_positive, 0.0).sum(dim=1) / num_positives.clamp(min=1)
    return means.sum() / (num_positives > 0).sum().clamp(min=1)


def contrastive_loss(head: str, temperature: float = 0.07) -> Loss:
    """Return a function that computes the contrastive loss of the head's inputs for images and their mirror images."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim != 1:
            raise ValueError(
                "selection_loss='contrastive' requires one class label per image, got "
                f"labels of shape {list(labels.shape)}; use selection_loss='task'"
            )
        with recorded_inputs(model.get_submodule(head)) as features:
            model(torch.cat([images, images.flip(-1)]))
        return supervised_contrastive(features[0].flatten(1), torch.cat([labels, labels]), temperature)

    return loss


def _selection_loss(data: SelectionData, head: str, options: Options) -> Loss:
    """Return the loss function that the option `selection_loss` selects.

    The default is the contrastive loss if each image has one class label, and the task's loss otherwise.
    """
    choice = options.get("selection_loss")
    task_loss = loss_of(data)
    contrastive = contrastive_loss(head, options.get("temperature", 0.07))

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        is_contrastive = choice == "contrastive" or (choice is None and labels.ndim == 1)
        chosen = contrastive if is_contrastive else task_loss
        return chosen(model, images, labels)

    return loss


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Compute gradients, select each neuron's inputs, and wrap the layers."""
    data = selection_data(batches)
    names = neuron_layers(model, head)
    loss = _selection_loss(data, head, options)
    weights = [f"{name}.weight" for name in names]
    gradients = summed_gradients(model, weights, data, loss, options.get("calibration_batches"))
    selected = {name: strongest_inputs(gradients.pop(f"{name}.weight"), options.get("k", 1)) for name in names}
    return _apply(model, head, selected)


def _apply(model: nn.Module, head: str, selected: Mapping[str, Tensor]) -> nn.Module:
    """Make the selected weights, the biases of their layers, the layer scales, and the head trainable."""
    train_head(model, head)
    for name in neuron_layers(model, head):
        bias: Any = model.get_submodule(name).bias
        if bias is not None:
            bias.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1].startswith("gamma"):  # a layer scale, such as gamma or gamma_1
            parameter.requires_grad_(True)
    for name, indices in selected.items():
        model.set_submodule(name, SparseUpdate(model.get_submodule(name), indices))
    return model


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild the modules from the stored positions."""
    return _apply(model, head, stored_indices(tensors))


GPS = Method(
    "each neuron's k weights with the largest gradients, and all biases except in norms",
    "gradient-based parameter selection, Zhang et al., arXiv 2312.10136",
    _build,
    tuple(_RULES),
    suffix="k",
    check=check_by(_RULES),
    needs_batches=True,
    restore=_restore,
    merge=merge_sparse,
)
"""GPS trains, for every neuron, the bias and the `k` weights with the largest gradients. A neuron is a row of a
`Linear` or `Conv2d` weight; `neuron_layers` documents the exceptions. The mask of the trained weights is

    M[i, j] = 1 if |Σ_batches ∂loss/∂W[i, j]| is among the k largest of row i.

GPS also trains layer scales and the head. Norms, tokens, and position embeddings stay frozen. With `k = 1`, a ViT-B/16
has 83,712 trained weights and as many biases.

The gradient of `selection_loss` is computed before training. `contrastive`, the default for one class label per image,
is the paper's loss. It compares the head's inputs within a batch, so the randomly initialized head has no influence.
The two views of an image are the image and its mirror image, whereas the paper uses two augmented views. `task`, the
default for other tasks, is the training loss, which includes the head. `calibration_batches` limits the number of
batches, by default to one epoch.
"""

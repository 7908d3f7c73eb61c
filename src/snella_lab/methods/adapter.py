"""Methods `adapter-r`, `mosa-r`, and `ssf`: small trainable modules after frozen layers."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from snella_app.methods.method import Batches, Method, Options, check_by, integer, number, one_of
from snella_app.methods.model_parts import is_inside, standardizes_weight
from snella_app.methods.partial import train_head
from snella_app.text import listed
from snella_lab.methods.parts import attach, mlps

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Adapter(nn.Module):
    """Residual bottleneck adapter, initialized as the identity.

    y = h + scale · (U · dropout(act(D h + d)) + u),   act = gelu, or relu as in A.1 of arXiv 2510.24037

    `D`, of shape `[r, width]`, is initialized from the Glorot uniform distribution; `U`, of shape `[width, r]`, and
    both biases are initialized to zero.

    Args:
        width: Size of the input's last dimension.
        r: Bottleneck width.
        scale: Scale of the bottleneck output.
        dropout: Dropout rate inside the bottleneck.
        activation: Key of `ACTIVATIONS`.
    """

    def __init__(
        self, width: int, r: int = 8, *, scale: float = 1.0, dropout: float = 0.0, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(r, width)
        self.scale = scale
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def bottleneck(self, h: Tensor) -> Tensor:
        """Compute the bottleneck's output before scaling."""
        return self.up(self.dropout(self.act(self.down(h))))

    def forward(self, h: Tensor) -> Tensor:
        """Add the scaled bottleneck output to `h`, `[..., width]`."""
        return h + self.scale * self.bottleneck(h)


def apply_adapter(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: apply the module's child `adapter` to its output."""
    return module.adapter(output)  # type: ignore[operator]


def add_adapters(method: str, model: nn.Module, head: str, make: Callable[[int, int], nn.Module]) -> nn.Module:
    """Attach an adapter to the MLP of each block, as a child module named `adapter`.

    Args:
        method: Method name for the error message.
        model: Frozen model, which is changed in place and returned.
        head: Name of the head, which becomes trainable.
        make: Function `(width, index) -> nn.Module` that creates a block's adapter.

    Raises:
        ValueError: If no block has an MLP, or an MLP already has an adapter.
    """
    mlp_layers = list(mlps(model, head))
    if not mlp_layers:
        raise ValueError(
            f"method {method!r} cannot be applied to {type(model).__name__}: it adapts the MLP of each block, "
            "but this model has no module named mlp or ffn with linear layers"
        )
    train_head(model, head)
    for index, (_, module, width) in enumerate(mlp_layers):
        attach(module, "adapter", make(width, index), after=apply_adapter)
    return model


def _build_adapter(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Attach an `Adapter` to each MLP, inside the residual branch."""
    return add_adapters("adapter", model, head, lambda width, index: Adapter(width, **options))


ADAPTER = Method(
    "a bottleneck after the MLP of each block",
    "adapters (Houlsby et al., arXiv 1902.00751), placed only after the MLP, as in Pfeiffer et al. (arXiv 2005.00247), "
    "VPT and NOAH",
    _build_adapter,
    ("r", "scale", "dropout", "activation"),
    suffix="r",
    check=check_by({"r": integer(), "scale": number(), "dropout": number(0, 1), "activation": one_of(*ACTIVATIONS)}),
    unmerged_reason="adds a nonlinear bottleneck to each block",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4, "r": 8},
)


class MosaAdapter(Adapter):
    """Mixture of sparse adapters (MoSA): each training forward pass uses a random sparse subset of the entries of `U`.

    training:    y = h + scale · (n · (U ⊙ M_i) dropout(gelu(D h + d)) + u),  i uniform in 1 … n per forward pass
    evaluation:  y = h + scale · (U gelu(D h + d) + u)

    The masks M_1 … M_n are a random, even partition of the entries of `U` `[width, r]`. Expert i consists of the
    entries that M_i selects. All experts share the down projection and the biases, as in the paper's hierarchical
    split. The mean of `n (U ⊙ M_i)` over i is `U`, so the experts merge into `U`, and only one adapter is stored.

    Args:
        width: Size of the input's last dimension.
        r: Bottleneck width.
        experts: Number of experts n.
        seed: Seed for the masks, which are not saved but regenerated on loading.
        scale: Scale of the bottleneck output.
        dropout: Dropout rate inside the bottleneck.
    """

    def __init__(
        self, width: int, r: int = 8, *, experts: int = 4, seed: int = 0, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__(width, r, scale=scale, dropout=dropout)
        self.experts = experts
        generator = torch.Generator().manual_seed(seed)
        expert_index = torch.randperm(width * r, generator=generator).remainder(experts).view(width, r)
        self.register_buffer("expert_index", expert_index.int(), persistent=False)

    def bottleneck(self, h: Tensor) -> Tensor:
        """Compute the output of a random expert in training mode, or of the merged adapter in evaluation mode."""
        if not self.training:
            return super().bottleneck(h)
        expert = int(torch.randint(self.experts, ()))
        masked_up = self.up.weight * (self.expert_index == expert) * self.experts
        return F.linear(self.dropout(self.act(self.down(h))), masked_up, self.up.bias)


def _build_mosa(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Attach a `MosaAdapter` to each MLP, with different masks for each block."""
    kwargs = {name: options[name] for name in ("r", "experts", "scale", "dropout") if name in options}
    seed = options.get("mask_seed", 0)
    return add_adapters("mosa", model, head, lambda width, index: MosaAdapter(width, seed=seed + index, **kwargs))


MOSA = Method(
    "a bottleneck after the MLP of each block, trained as a mixture of random sparse experts",
    "MoSA, Zhang et al., arXiv 2312.02923",
    _build_mosa,
    ("r", "experts", "scale", "dropout", "mask_seed"),
    suffix="r",
    check=check_by(
        {"r": integer(), "experts": integer(), "scale": number(), "dropout": number(0, 1), "mask_seed": integer(0)}
    ),
    unmerged_reason="adds a nonlinear bottleneck to each block",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-2, "r": 16},
)


class ScaleShift(nn.Module):
    """Per-channel scale and shift: y = γ ⊙ x + β.

    γ is initialized from N(1, init_std²) and β from N(0, init_std²).

    Args:
        channels: Number of channels.
        dim: Channel dimension of the input: -1 for tokens, 1 for feature maps.
        init_std: Standard deviation of the initialization. If 0, the module starts as the identity.

    Attributes:
        was_used: True after the first forward pass; see `warn_about_unused`.
    """

    def __init__(self, channels: int, *, dim: int = -1, init_std: float = 0.02) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.dim = dim
        self.was_used = False
        if init_std > 0:
            nn.init.normal_(self.scale, mean=1.0, std=init_std)
            nn.init.normal_(self.shift, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of `x`."""
        self.was_used = True
        scale, shift = self.scale.to(x.dtype), self.shift.to(x.dtype)
        if self.dim == 1:
            shape = (1, -1) + (1,) * (x.ndim - 2)
            scale, shift = scale.view(shape), shift.view(shape)
        return x * scale + shift


def apply_scale_shift(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: apply the layer's child `ssf` to its output."""
    return module.ssf(output)  # type: ignore[operator]


def _scaled_layers(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """Return the name, the layer and its child `ssf` for each layer with γ and β."""
    children = [(name, module, module._modules.get("ssf")) for name, module in model.named_modules()]
    return [(name, module, ssf) for name, module, ssf in children if isinstance(ssf, ScaleShift)]


def _remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a forward hook, also from a copy of the model, unlike the handle that the registration returns."""
    for key in [key for key, registered in module._forward_hooks.items() if registered is hook]:
        del module._forward_hooks[key]


def warn_about_unused(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model: after the first training pass, warn about layers whose `ssf` was never called."""
    if module.training and not getattr(module, "ssf_was_checked", False):
        module.ssf_was_checked = True  # type: ignore[assignment]
        unused = [name for name, _, ssf in _scaled_layers(module) if not ssf.was_used]
        if unused:
            warnings.warn(
                f"method 'ssf' has no effect on {len(unused)} layers of {type(module).__name__}, e.g. "
                f"{unused[:3]}: the model does not call them or reads their weights directly",
                stacklevel=2,
            )


def _channels(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of output channels and the channel dimension of a layer.

    Supports linear layers, 2D convolutions, batch and group normalizations, and layer normalizations over one axis.
    Returns None for other modules.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.Conv2d):
        return module.out_channels, 1
    if isinstance(module, _BatchNorm):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        # timm's LayerNorm2d and LayerNorm2dFp32 and transformers' channels-first norms take feature maps, not tokens
        takes_maps = "2d" in type(module).__name__ or getattr(module, "data_format", None) == "channels_first"
        return module.normalized_shape[-1], 1 if takes_maps else -1
    return None


def _build_ssf(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Attach a `ScaleShift` to each layer outside the head that `_channels` supports."""
    layers: list[tuple[nn.Module, tuple[int, int]]] = []
    for name, module in model.named_modules():
        channels_and_dim = _channels(module)
        if channels_and_dim is not None and not is_inside(name, head):
            layers.append((module, channels_and_dim))
    if not layers:
        raise ValueError(
            f"method 'ssf' cannot be applied to {type(model).__name__}: there are no linear layers, convolutions or "
            f"normalizations outside the head {head!r}"
        )
    train_head(model, head)
    for module, (channels, dim) in layers:
        ssf = ScaleShift(channels, dim=dim, init_std=options.get("init_std", 0.02))
        attach(module, "ssf", ssf, after=apply_scale_shift)
    model.register_forward_hook(warn_about_unused)
    return model


@torch.no_grad()
def _merge_ssf(model: nn.Module) -> nn.Module:
    """Merge γ and β into each layer: W <- γ W, b <- γ b + β.

    `nn.MultiheadAttention` reads the weight of its output projection without calling the layer. γ and β of this layer
    therefore have no effect, and its weight and bias remain unchanged.

    Raises:
        ValueError: If γ and β of a layer cannot be merged; no layer is changed in this case.
    """
    skipped = [module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    layers = _scaled_layers(model)
    unsupported = [
        repr(name) for name, module, _ in layers if module not in skipped and not _is_affine_with_bias(module)
    ]
    if unsupported:
        raise ValueError(
            f"method 'ssf' cannot be merged into {type(model).__name__}: it requires layers with a bias and without "
            f"activation or weight standardization, unlike {listed(unsupported, 1)}; keep the adapter separate and "
            "load it with load_trained"
        )
    # scaling a shared weight would also change the other layers that use it
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    shared: list[str] = []
    for name, module, _ in layers:
        if module in skipped:
            continue
        max_owners = max(owners[id(module.weight)], owners[id(module.bias)])
        if max_owners > 1:
            shared.append(repr(name))
    if shared:
        raise ValueError(
            f"method 'ssf' cannot be merged into {type(model).__name__}: several layers share the weight or bias of "
            f"{listed(shared, 1)}; keep the adapter separate and load it with load_trained"
        )
    for _, module, ssf in layers:
        if module not in skipped:
            weight: Tensor = module.weight  # type: ignore[assignment]
            bias: Tensor = module.bias  # type: ignore[assignment]
            weight.mul_(ssf.scale.view(-1, *[1] * (weight.ndim - 1)))
            bias.mul_(ssf.scale).add_(ssf.shift)
        delattr(module, "ssf")
        _remove_hook(module, apply_scale_shift)
    _remove_hook(model, warn_about_unused)
    return model


def _is_affine_with_bias(module: nn.Module) -> bool:
    """Return True for a layer that has a weight and a bias, but no activation or weight standardization.

    timm's `NormAct` layers contain an activation.
    """
    has_parameters = getattr(module, "weight", None) is not None and module.bias is not None
    has_activation = not isinstance(getattr(module, "act", None), nn.Identity | None)
    return has_parameters and not has_activation and not standardizes_weight(module)


SSF = Method(
    "a per-channel scale and shift after each layer",
    "SSF, Lian et al., arXiv 2210.08823",
    _build_ssf,
    ("init_std",),
    check=check_by({"init_std": number()}),
    merge=_merge_ssf,
    defaults={"lr": 5e-3, "head_lr": 1e-3, "weight_decay": 5e-5},
)

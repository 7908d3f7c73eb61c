"""`ssf`: a scale and a shift of each channel after each operation, merged into the weights at the end."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snella.methods.method import Batches, Method, Options, check_by, number
from snella.methods.model_parts import attach, attached, detach, is_inside, remove_hooks
from snella.methods.partial import train_head


class ScaleShift(nn.Module):
    """y = γ ⊙ x + β, channel by channel.

    γ starts normal around 1, β normal around 0.

    Args:
        channels: How many.
        dim: The dimension of the input that holds them: -1 for tokens, 1 for feature maps.
        init_std: Standard deviation of both at the start; 0 begins with the identity.
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
        """`x` with each channel scaled and shifted."""
        self.was_used = True
        scale, shift = self.scale.to(x.dtype), self.shift.to(x.dtype)
        if self.dim == 1:
            shape = (1, -1) + (1,) * (x.ndim - 2)
            scale, shift = scale.view(shape), shift.view(shape)
        return x * scale + shift


def apply_scale_shift(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: pass the output of an operation on to its child `ssf`."""
    return module.ssf(output)  # type: ignore[operator]


def warn_of_unused(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model: say once which operations it does not call, so that nothing follows them."""
    if module.training and not getattr(module, "ssf_was_checked", False):
        module.ssf_was_checked = True  # type: ignore[assignment]
        unused = [name for name, _, ssf in attached(module, "ssf", ScaleShift) if not ssf.was_used]
        if unused:
            warnings.warn(
                f"method 'ssf' changes nothing at {len(unused)} operations of {type(module).__name__}, e.g. "
                f"{unused[:3]}: the model does not use them, or reads their weights past them",
                stacklevel=2,
            )


def _channels(module: nn.Module) -> tuple[int, int] | None:
    """Channels of an operation's output and the dimension that holds them; None for what is no operation."""
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.Conv2d):
        return module.out_channels, 1
    if isinstance(module, _BatchNorm):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    if isinstance(module, nn.LayerNorm):
        # timm's LayerNorm2d and the channels-first norms of transformers take feature maps, LayerNorms all the same
        takes_maps = type(module).__name__.endswith("2d") or getattr(module, "data_format", None) == "channels_first"
        return module.normalized_shape[-1], 1 if takes_maps else -1
    return None


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Attach a `ScaleShift` to each linear layer, convolution and normalization outside of the head."""
    places = [
        (module, found)
        for name, module in model.named_modules()
        if not is_inside(name, head) and (found := _channels(module)) is not None
    ]
    if not places:
        raise ValueError(
            f"method 'ssf' cannot be applied to {type(model).__name__}: it follows linear layers, convolutions and "
            f"normalizations, and there is none besides the head {head!r}"
        )
    train_head(model, head)
    for module, (channels, dim) in places:
        ssf = ScaleShift(channels, dim=dim, init_std=options.get("init_std", 0.02))
        attach(module, "ssf", ssf, after=apply_scale_shift)
    model.register_forward_hook(warn_of_unused)
    return model


@torch.no_grad()
def _merge(model: nn.Module) -> nn.Module:
    """W <- γ W, b <- γ b + β in each operation."""
    places = list(attached(model, "ssf", ScaleShift))
    without = [name for name, module, _ in places if getattr(module, "weight", None) is None or module.bias is None]
    if without:
        shown = repr(without[0]) + (f" and {len(without) - 1} more layers" if without[1:] else "")
        raise ValueError(
            f"method 'ssf' cannot be folded into {type(model).__name__}: no bias to take the shift in {shown}; "
            "keep the adapter beside the backbone, load_trained puts it back"
        )
    for _, module, ssf in places:
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor = module.bias  # type: ignore[assignment]
        weight.mul_(ssf.scale.view(-1, *[1] * (weight.ndim - 1)))
        bias.mul_(ssf.scale).add_(ssf.shift)
        detach(module, "ssf", apply_scale_shift)
    remove_hooks(model, warn_of_unused)
    return model


SSF = Method(
    "a scale and a shift of each channel after each operation",
    "SSF, Lian et al., arXiv 2210.08823",
    _build,
    ("init_std",),
    check=check_by({"init_std": number()}),
    merge=_merge,
    defaults={"lr": 5e-3, "head_lr": 1e-3, "weight_decay": 5e-5},
)

"""Detection of frozen heads with initial random values."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from snella.targets import HEAD_NAMES, PREDICTOR_NAMES, head_modules

_OUTPUT_EMBEDDINGS = {"lm_head", "proj_out"}  # pre-trained with the model
_MIN_ENTRIES = 256  # minimum for the statistical tests below
_SIGMAS = 5.0  # tolerance in standard deviations; a new head fails a test with probability below 1e-6


class NewHeads:
    """Record of frozen, newly initialized head layers and their calls."""

    def __init__(self) -> None:
        self._recorders: dict[str, tuple[nn.Module, _CallRecorder, torch.utils.hooks.RemovableHandle]] = {}

    def find(self, model: nn.Module) -> None:
        """Find frozen, newly initialized head layers and start recording their calls."""
        for name, layer in _head_layers(model).items():
            if not any(p.requires_grad for p in layer.parameters()) and is_newly_initialized(layer.weight, layer.bias):
                recorder = _CallRecorder()
                self._recorders[name] = layer, recorder, layer.register_forward_hook(recorder)

    def frozen_and_used(self) -> list[str]:
        """Stop recording and return the names of the called layers that are still frozen."""
        recorders, self._recorders = self._recorders, {}
        for _, _, handle in recorders.values():
            handle.remove()
        return [
            name
            for name, (layer, recorder, _) in recorders.items()
            if recorder.is_called and not any(p.requires_grad for p in layer.parameters())
        ]


class _CallRecorder:
    """Forward hook that records whether a layer is called; unlike a closure, it is picklable."""

    def __init__(self) -> None:
        self.is_called = False

    def __call__(self, *_: Any) -> None:
        self.is_called = True


def _head_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the linear and convolutional layers of a model's classifiers and predictors, outside adapters."""
    heads, layers = head_modules(model), {}
    adapter_prefixes: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in adapter_prefixes) or _OUTPUT_EMBEDDINGS.intersection(parts):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapter_prefixes.append(f"{name}.")
        elif type(module) in (nn.Linear, nn.Conv2d):
            prefixes = {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
            is_part = any(model.get_submodule(prefix) in heads for prefix in prefixes)
            if is_part or parts[0] in HEAD_NAMES or PREDICTOR_NAMES.intersection(parts):
                layers[name] = module
    return layers


@torch.no_grad()
def is_newly_initialized(weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a layer looks newly initialized.

    Three patterns count as new:

    - All values are zero.
    - Weight and bias follow torch's default `U(-1/√n, 1/√n)`, with values at the bound.
    - The bias is zero, and the entries of the weight are independent, according to their mean, the row norms and the
      angles between rows.

    A trained layer has a nonzero bias and exceeds the bound; rows of class embeddings are correlated.

    Args:
        weight: `[m, …]`.
        bias: `[m]`.
    """
    tensors = [weight] if bias is None else [weight, bias]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta or not t.is_floating_point() for t in tensors):
        return False
    if weight.ndim < 2 or weight.numel() == 0:
        return False
    rows = weight.detach().float().flatten(1)  # [m, n]
    has_bias = bias is not None and bool(bias.any())
    if not rows.any() and not has_bias:
        return True
    if rows.numel() < _MIN_ENTRIES:
        return False
    if bias is not None and has_bias:
        return _is_default_init(rows, bias.float(), torch.finfo(weight.dtype).eps)
    return _is_default_init(rows, None, torch.finfo(weight.dtype).eps) or (bias is not None and _is_noise(rows))


def _is_default_init(rows: Tensor, bias: Tensor | None, eps: float) -> bool:
    """Return whether a layer has the default initialization of `nn.Linear` and `nn.Conv2d`."""
    bound, count = 1 / math.sqrt(rows.shape[1]), rows.numel()
    largest, square = float(rows.abs().max()), float(rows.square().mean())
    is_bounded = largest <= bound * (1 + eps) and (bias is None or float(bias.abs().max()) <= bound * (1 + eps))
    reaches_bound = largest >= bound * (1 - 7 / count)
    return is_bounded and reaches_bound and abs(3 * square / bound**2 - 1) < _SIGMAS * math.sqrt(0.8 / count)


def _is_noise(rows: Tensor) -> bool:
    """Return whether the entries of a matrix look like i.i.d. draws from a symmetric distribution."""
    n = rows.shape[1]
    square = rows.square().mean()
    if float(rows.mean().abs()) > _SIGMAS * float((square / rows.numel()).sqrt()):
        return False
    # variance of the squares: 2 for normal, 0.8 for uniform entries
    variance = float((rows.square() / square).var(correction=0))
    norms = rows.square().mean(1) / square  # [m]
    if variance > 4 or float((norms - 1).abs().max()) > _SIGMAS * math.sqrt(variance / n) + 1e-3:
        return False
    sample = nn.functional.normalize(rows[:512], dim=1)
    cosines = (sample @ sample.T).square().triu(1).sum()
    pairs = len(sample) * (len(sample) - 1) / 2
    return pairs == 0 or float(cosines) * n / pairs < 1 + _SIGMAS * math.sqrt(2 / pairs)

"""Heads that are used with their initial random values and are not trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from snella.targets import HEAD_NAMES, PREDICTOR_NAMES, head_modules

_OUTPUTS = {"lm_head", "proj_out"}  # these come with the model
_LEAST_ENTRIES = 256  # too few entries for the tests below
_SIGMAS = 5.0  # of sampling noise: one fresh head in millions is missed by each test


class NewHeads:
    """The frozen layers of a model's head whose values look newly drawn, and whether the model calls them."""

    def __init__(self) -> None:
        self._notes: dict[str, tuple[nn.Module, _Note, torch.utils.hooks.RemovableHandle]] = {}

    def find(self, model: nn.Module) -> None:
        """Look for them, and note their calls from now on."""
        for name, layer in _head_layers(model).items():
            if not any(p.requires_grad for p in layer.parameters()) and looks_new(layer.weight, layer.bias):
                note = _Note()
                self._notes[name] = layer, note, layer.register_forward_hook(note)

    def frozen_and_used(self) -> list[str]:
        """Names of those that were called and are still frozen; their calls are noted no more."""
        notes, self._notes = self._notes, {}
        for _, _, handle in notes.values():
            handle.remove()
        return [
            name
            for name, (layer, note, _) in notes.items()
            if note.is_called and not any(p.requires_grad for p in layer.parameters())
        ]


class _Note:
    """A forward hook that notes a call; a class of its own, as models are copied and pickled with their hooks."""

    def __init__(self) -> None:
        self.is_called = False

    def __call__(self, *_: Any) -> None:
        self.is_called = True


def _head_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and convolutional layers of a model's classifiers and predictors, without those of adapters."""
    heads, layers = head_modules(model), {}
    held: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in held) or _OUTPUTS.intersection(parts):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            held.append(f"{name}.")
        elif type(module) in (nn.Linear, nn.Conv2d):
            prefixes = {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
            is_part = any(model.get_submodule(prefix) in heads for prefix in prefixes)
            if is_part or parts[0] in HEAD_NAMES or PREDICTOR_NAMES.intersection(parts):
                layers[name] = module
    return layers


@torch.no_grad()
def looks_new(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer has the values that libraries draw for a new one.

    Zeros; torch's own draw, `U(-1/√n, 1/√n)` for weight and bias, up to its very bound; or a bias of zeros and a
    weight whose entries are independent by their mean, the norms of its rows and the angles between them. Training
    leaves neither a bias of zeros nor that bound, and rows of class embeddings are not independent.

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
    if rows.numel() < _LEAST_ENTRIES:
        return False
    if bias is not None and has_bias:
        return _is_torchs_own(rows, bias.float(), torch.finfo(weight.dtype).eps)
    return _is_torchs_own(rows, None, torch.finfo(weight.dtype).eps) or (bias is not None and _is_noise(rows))


def _is_torchs_own(rows: Tensor, bias: Tensor | None, eps: float) -> bool:
    """Whether a layer is as `nn.Linear` and `nn.Conv2d` draw it."""
    bound, count = 1 / math.sqrt(rows.shape[1]), rows.numel()
    largest, square = float(rows.abs().max()), float(rows.square().mean())
    is_bounded = largest <= bound * (1 + eps) and (bias is None or float(bias.abs().max()) <= bound * (1 + eps))
    reaches_bound = largest >= bound * (1 - 7 / count)
    return is_bounded and reaches_bound and abs(3 * square / bound**2 - 1) < _SIGMAS * math.sqrt(0.8 / count)


def _is_noise(rows: Tensor) -> bool:
    """Whether the entries of a matrix look drawn independently from one symmetric distribution."""
    n = rows.shape[1]
    square = rows.square().mean()
    if float(rows.mean().abs()) > _SIGMAS * float((square / rows.numel()).sqrt()):
        return False
    spread = float((rows.square() / square).var(correction=0))  # of the squares: 2 for normal, 0.8 for uniform entries
    norms = rows.square().mean(1) / square  # [m]
    if spread > 4 or float((norms - 1).abs().max()) > _SIGMAS * math.sqrt(spread / n) + 1e-3:
        return False
    some = nn.functional.normalize(rows[:512], dim=1)
    cosines = (some @ some.T).square().triu(1).sum()
    pairs = len(some) * (len(some) - 1) / 2
    return pairs == 0 or float(cosines) * n / pairs < 1 + _SIGMAS * math.sqrt(2 / pairs)

"""Methods that train weights of the backbone itself: `linear`, `bias`, `full`. Nothing is added or folded."""

from torch import nn

from snella.methods.head import is_inside
from snella.methods.method import Batches, Method, Options, unchanged
from snella.methods.normalisation import freeze_running_statistics


def train_head(model: nn.Module, head: str) -> None:
    """Let the head learn, and keep batch statistics as pre-trained: what every method begins with.

    Args:
        model: With all parameters frozen; changed in place.
        head: Name of its head.
    """
    freeze_running_statistics(model)
    model.get_submodule(head).requires_grad_(True)


def _linear(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Linear probe: only the head learns."""
    train_head(model, head)
    return model


def _bias(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """BitFit: every bias and the head."""
    train_head(model, head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head) or name.rsplit(".", 1)[-1] == "bias")
    return model


def _full(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Full fine-tuning, running statistics included."""
    return model.requires_grad_(True)


LINEAR = Method("only the head", "linear probing", _linear, merge=unchanged)
BIAS = Method("all biases and the head", "BitFit, Ben Zaken et al., arXiv 2106.10199", _bias, merge=unchanged)
FULL = Method("all weights", "full fine-tuning", _full, merge=unchanged)

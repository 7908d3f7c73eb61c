"""How many of the backbone's weights a run has changed: how far merged weights differ from the pre-trained ones."""

from pathlib import Path

from torch import nn

from snella.methods import merge_trained, spec_of
from snella.methods.model_parts import is_inside
from snella.runs import load_run
from snella.runs.build import make_backbone


def count_changed_weights(run: Path) -> int | None:
    """Fold what a run has trained into its backbone and count the values that are other than before, the head aside.

    Args:
        run: Folder of a finished run.

    Returns:
        None for a method that cannot be folded: it adds to the backbone and leaves its weights alone.
    """
    loaded = load_run(run, device="cpu")
    head = spec_of(loaded.model).head
    try:
        merged = merge_trained(loaded.model)
    except ValueError:
        return None
    return count_differences(merged, make_backbone(loaded.info["backbone"], loaded.task.name), head)


def count_differences(model: nn.Module, other: nn.Module, head: str) -> int:
    """How many values of the parameters of two models of one architecture differ.

    Args:
        model: One.
        other: The other.
        head: Name of the module that is left out.
    """
    values = dict(other.named_parameters())
    return sum(
        int((parameter != values[name]).sum())
        for name, parameter in model.named_parameters()
        if not is_inside(name, head)
    )

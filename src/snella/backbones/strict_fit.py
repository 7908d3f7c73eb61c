"""What keeps a state dict from fitting a model, said in words: tensors that are missing, extra or of another shape."""

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["faults", "listed"]

_SHOWN = 5


def faults(
    state: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    may_lack: tuple[str, ...] = (),
    may_lack_endings: tuple[str, ...] = (),
) -> list[str]:
    """One sentence for each kind of fault, with names and shapes; empty where `state` fits.

    Args:
        state: What a file holds, in the model's names.
        reference: State dict of the model.
        may_lack: Beginnings of names that the file need not hold.
        may_lack_endings: Endings of such names.
    """
    missing = [
        f"{key} {list(value.shape)}"
        for key, value in reference.items()
        if key not in state and not key.startswith(may_lack) and not key.endswith(may_lack_endings)
    ]
    unexpected = [f"{key} {list(value.shape)}" for key, value in state.items() if key not in reference]
    reshaped = [
        f"{key}: file {list(value.shape)}, model {list(reference[key].shape)}"
        for key, value in state.items()
        if key in reference and value.shape != reference[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(found)} {kind} ({listed(found)})" for kind, found in kinds if found]


def listed(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    shown = list(items)
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

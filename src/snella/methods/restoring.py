"""Rebuilding from a file what was chosen from data: a file of another model is named as such."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snella.methods.adapter_files import AdapterFileError


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Say of an error inside that the stored choice does not fit the model.

    Raises:
        AdapterFileError: A layer is missing, is of another kind or has fewer weights.
    """
    try:
        yield
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as fault:
        raise AdapterFileError(
            f"the adapter does not fit {type(model).__name__}: {fault}; load it into the architecture it was trained on"
        ) from fault

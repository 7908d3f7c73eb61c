"""Plugin with a method, a data format and a command; install with `pip install ./examples/plugin`.

snella train --method norms --data npz:small.npz --backbone NAME --out runs/small
snella classes npz:small.npz
"""

from pathlib import Path

from snella_app.cli.command import command


def build_norms(model, head, options, batches):
    """Train only normalization layers and the head."""
    from torch import nn

    from snella_app.methods.model_parts import is_inside

    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head) or any(is_inside(name, norm) for norm in norms))
    return model


def __getattr__(name):
    """Create `NORMS` lazily, so that `--help` does not import torch."""
    if name != "NORMS":
        raise AttributeError(name)
    from snella_app.methods.method import Method, unchanged

    return Method(
        "normalization layers and the head",
        "Frankle et al., arXiv 2003.00152",
        build_norms,
        merge=unchanged,
        defaults={"lr": 2e-3, "head_lr": 1e-3, "weight_decay": 0.0},
    )


def load_npz(path):
    """Load `images` `[N, H, W]` uint8 and `labels` `[N]` from an `.npz` file."""
    import numpy as np

    from snella_app.data.datasets import Collection, ImageDataset
    from snella_app.data.sources import ArrayImages

    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    classes = [str(label) for label in np.unique(labels)]
    numbers = [classes.index(str(label)) for label in labels]
    names = [f"{Path(path).name}[{row}]" for row in range(len(labels))]
    return Collection(Path(path).stem, classes, ImageDataset(ArrayImages(images), range(len(labels)), numbers, names))


@command("snella_app.data")
def classes(data: str, /) -> None:
    """Print the classes of a dataset.

      snella classes npz:small.npz

    Args:
        data: Dataset, as for snella train --data.
    """
    from snella_app.data.load import load_data

    print(", ".join(load_data(data).classes))

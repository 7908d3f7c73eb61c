"""The classifier head of a model: its module name, and which parameters belong to it."""

from torch import nn


def find_head(model: nn.Module, head: str | None = None) -> str:
    """Name of the module that turns features into class scores.

    timm models say it themselves (`pretrained_cfg["classifier"]`, `get_classifier()`).

    Args:
        model: A classifier.
        head: The name, for a model that does not say.

    Returns:
        A name out of `model.named_modules()`, e.g. `"head"`, `"fc"` or `"head.fc"`.

    Raises:
        ValueError: The model has no such module, does not say which it is, or it has no weights (`num_classes=0`).
    """
    modules = dict(model.named_modules())
    if head is not None:
        if head not in modules:
            linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"head must name a module of the model, got {head!r}; its last linear layers are {linears[-3:]}"
            )
        name = head
    else:
        name = _declared_head(model, modules)
    if not any(True for _ in modules[name].parameters()):
        raise ValueError(
            f"the head {name!r} has no weights (num_classes={getattr(model, 'num_classes', None)}); "
            "create the model with num_classes of at least 2"
        )
    return name


def _declared_head(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """The head that a timm model declares."""
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(declared, str) and declared in modules:
        return declared
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    for name, module in modules.items():
        if module is classifier:
            return name
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    raise ValueError(
        f"{type(model).__name__} does not say which module is its classifier head; "
        f"pass head=..., its last linear layers are {linears[-3:]}"
    )


def is_inside(name: str, module_name: str) -> bool:
    """Whether `name` is the module `module_name` or lies within it."""
    return name == module_name or name.startswith(module_name + ".")

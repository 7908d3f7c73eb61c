"""From the name that a user typed to a ready timm model."""

import difflib
from pathlib import Path
from typing import Any

import timm
from timm.models import get_deprecated_models, is_model_in_modules
from torch import nn

from snella.backbones.architecture import infer_architecture
from snella.backbones.checkpoint import WEIGHT_SUFFIXES, Checkpoint, load_weights, read_checkpoint, weight_suffix
from snella.backbones.data_config import update_config
from snella.backbones.folder import read_folder
from snella.backbones.hub import create_from_hub
from snella.backbones.packaged import PACKAGED, load_packaged, packaged_names

__all__ = ["create_backbone"]

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_FOLDER_PREFIX = "local-dir:"


def create_backbone(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
) -> nn.Module:
    """Build a timm model with its weights and a head of `num_classes`.

    `timm.data.resolve_model_data_config(model)` then gives mean, std, interpolation and the chosen input size.
    A head of another class count in the weights is left out and the new one keeps its random start; every other
    tensor must be there in its shape. Positions are resampled where the input size differs.

    Args:
        name: A timm name (`vit_base_patch16_224.augreg_in21k`, or `hf-hub:owner/repo`), a package-borne name
            (`packaged_names()`), a folder in the hub's timm format (`config.json` and `model.safetensors` or
            `pytorch_model.bin`), or a weight file of a ViT, Swin or ConvNeXt whose architecture is read from its
            shapes.
        num_classes: Outputs of the head; 0 leaves the head out.
        weights: Weight file (`.pth`, `.pth.tar`, `.pt`, `.bin`, `.safetensors`, Google's `.npz`) for the architecture
            `name`; it takes the place of the hub, whatever `pretrained` says. Where its content tells who published
            it (Google, MAE, MoCo v3, Microsoft's Swin, Facebook's ConvNeXt), images are normalised as they did.
        pretrained: False leaves every weight at its random start and needs neither hub nor package.
        img_size: Side of the square input in pixels; by default the one that the weights were trained with.

    Raises:
        ValueError: An unknown name (with the nearest ones), weights that do not fit, a size that patches cannot tile.
        FileNotFoundError: A path that does not exist.
        ImportError: A package-borne name whose package is not installed.
        ConnectionError: The hub is needed and cannot be reached.
    """
    _check_numbers(num_classes, img_size)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in PACKAGED:
        _refuse_second_weights(name, weights, "comes with the weights of a package")
        model = _build(PACKAGED[name].architecture, options, img_size)
        if pretrained:
            load_packaged(model, name)
    elif name.startswith(_HUB_PREFIXES):
        _refuse_second_weights(name, weights, "comes with weights of its own")
        size = {} if img_size is None else {"img_size": img_size}
        model = create_from_hub(name, pretrained=pretrained, **options, **size)
    elif (path := _as_path(name)) is not None:
        _refuse_second_weights(name, weights, "comes with weights of its own")
        model = _from_path(path, name, options, pretrained, img_size)
    elif weights is not None:
        known, checkpoint = _known(name), read_checkpoint(Path(weights).expanduser())
        extra = _pooling(known, checkpoint)
        model = _keep_arguments(_build(known, options | extra, img_size), extra)
        load_weights(model, checkpoint, name=name)
    elif pretrained:
        known = _known(name)
        _check_has_weights(known)
        model = create_from_hub(known, pretrained=True, **options, **_size_option(known, img_size))
    else:
        model = _build(_known(name), options, img_size)
    return _with_input_size(model, name, img_size)


def _from_path(path: Path, name: str, options: dict[str, Any], pretrained: bool, img_size: int | None) -> nn.Module:
    """Build from a folder in the hub's format, or from a weight file whose architecture its shapes tell."""
    if path.is_dir():
        folder = read_folder(path)
        size: dict[str, Any] = {"img_size": img_size} if folder.has_fixed_input_size and img_size is not None else {}
        model = timm.create_model(f"{_FOLDER_PREFIX}{path}", pretrained=False, **options, **size)
        if pretrained:
            load_weights(model, read_checkpoint(folder.weights), name=name)
        return model
    checkpoint = read_checkpoint(path)
    found = infer_architecture(checkpoint, source=name)
    side = found.img_size if img_size is None else img_size
    model = _keep_arguments(_build(found.name, options | found.options, side), found.options)
    if pretrained:
        load_weights(model, checkpoint, name=found.name)
    return _with_input_size(model, found.name, side)


def _keep_arguments(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Note what a name alone does not say, under timm's own key for it, so that others can build the same model."""
    if arguments:
        update_config(model, model_args=arguments)
    return model


def _pooling(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Average pooling for a ViT whose weights hold the norm that follows it, as MAE's fine-tuned ones do."""
    has_norm_after = "fc_norm.weight" in checkpoint.state and "norm.weight" not in checkpoint.state
    is_vit = is_model_in_modules(name.partition(".")[0], ["vision_transformer"])
    return {"global_pool": "avg"} if has_norm_after and is_vit else {}


def _build(name: str, options: dict[str, Any], img_size: int | None) -> nn.Module:
    """Build with random weights."""
    return timm.create_model(name, pretrained=False, **options, **_size_option(name, img_size))


def _size_option(name: str, img_size: int | None) -> dict[str, Any]:
    """`img_size` for the models that have a size built in; the others take any."""
    cfg = timm.get_pretrained_cfg(name) if img_size is not None else None
    return {"img_size": img_size} if cfg is not None and cfg.fixed_input_size else {}


def _with_input_size(model: nn.Module, name: str, img_size: int | None) -> nn.Module:
    """Note the chosen size in the model's data config, where transforms look it up."""
    if img_size is None:
        return model
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and img_size % patch[0]:
        lower = img_size // patch[0] * patch[0]
        near = [size for size in (lower, lower + patch[0]) if size > 0]
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch[0]} of {name!r}, got {img_size}; "
            f"near ones: {', '.join(map(str, near))}"
        )
    update_config(model, input_size=(3, img_size, img_size), test_input_size=None)
    return model


def _as_path(name: str) -> Path | None:
    """`name` as a path where it is one, None where it is a model's name."""
    if name.startswith(_FOLDER_PREFIX):
        path = Path(name.removeprefix(_FOLDER_PREFIX)).expanduser()
    else:
        path = Path(name).expanduser()
        looks_like_path = weight_suffix(path) in WEIGHT_SUFFIXES or "/" in name or "\\" in name
        if not looks_like_path and (timm.is_model(name) or not path.exists()):
            return None
    if not path.exists():
        raise FileNotFoundError(
            f"backbone {name!r}: no such file or folder; a repository on the hub is written 'hf-hub:owner/name'"
        )
    return path


def _known(name: str) -> str:
    """`name` as timm has it today, an error with the nearest names if it has none such."""
    name = get_deprecated_models().get(name) or name
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        names = [*timm.list_pretrained(f"{architecture}.*"), *packaged_names()]
        tags = [full.partition(".")[2] for full in names if full.partition(".")[0] == architecture]
        if not tag or tag in tags:
            return name
        near = difflib.get_close_matches(tag, tags, n=5, cutoff=0.0)
        known = ", ".join(repr(f"{architecture}.{near_tag}") for near_tag in near) or "none"
        raise ValueError(f"unknown weights {tag!r} of backbone {architecture!r}; known ones: {known}")
    names = [*timm.list_models(), *timm.list_pretrained(), *packaged_names()]
    nearest = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"nearest: {', '.join(map(repr, nearest))}" if nearest else "timm.list_models() lists all names"
    raise ValueError(
        f"unknown backbone {name!r}; {hint}. A local file or folder and {', '.join(packaged_names())} are names as well"
    )


def _check_has_weights(name: str) -> None:
    """Refuse `pretrained=True` where timm has no weights for `name`."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"timm has no pre-trained weights for backbone {name!r}; give a file with weights=PATH or "
            "start from random values with pretrained=False"
        )


def _refuse_second_weights(name: str, weights: str | None, why: str) -> None:
    """Refuse `weights=` beside a name that brings its own."""
    if weights is not None:
        raise ValueError(
            f"weights={weights!r} given, but backbone {name!r} {why}; "
            "give the architecture's timm name with weights=PATH instead"
        )


def _check_numbers(num_classes: int, img_size: int | None) -> None:
    """Refuse sizes that no model can have."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no head) or more, got {num_classes}")
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")

"""Create timm backbones from a name, a folder, or a weight file."""

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError, URLError

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.data import resolve_model_data_config
from timm.models import adapt_input_conv, get_deprecated_models, is_model_in_modules, load_model_config_from_hf
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from snella_app.backbones.architectures import infer_architecture
from snella_app.backbones.checkpoint import (
    WEIGHT_SUFFIXES,
    load_weights,
    read_checkpoint,
    update_config,
    weight_suffix,
)
from snella_app.files import expand_user
from snella_app.plugins import plugin, plugins
from snella_app.text import first_line, nearest


@dataclass(frozen=True)
class NamedBackbone:
    """Pre-trained backbone registered by a package under the entry point group `snella.backbones`.

    Attributes:
        architecture: Name of the timm model.
        load: Loads the weights into a model of that architecture with any image size and head. Raises an `ImportError`
            with the install command if a required package is missing.
    """

    architecture: str
    load: Callable[[nn.Module], None]


@cache
def _timm_names() -> frozenset[str]:
    """Return the names of timm's models and weights, which packages cannot register."""
    return frozenset([*timm.list_models(), *timm.list_pretrained()])


def packaged_names() -> list[str]:
    """Return the names of the backbones registered by packages."""
    return list(plugins("backbones", _timm_names()))


_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names of weight files in a folder, in order of preference."""


def _read_folder(path: Path) -> tuple[Path, bool]:
    """Return the weight file of a folder in timm's format, and whether the model has a fixed input size.

    Raises FileNotFoundError for missing files, and ValueError for a `config.json` that is not JSON or does not name a
    timm model.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"backbone folder '{path}' must contain config.json and {_WEIGHT_FILES[0]}; config.json is missing"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{config_file}' is not readable JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture is None:
        other = config.get("architectures") if isinstance(config, dict) else None
        detail = f", only the transformers model {other}" if other else ""
        raise ValueError(f"'{config_file}' must name a timm model under 'architecture', got none{detail}")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = nearest(str(architecture), timm.list_models(), most=5, cutoff=0.5)
        raise ValueError(f"'architecture' in '{config_file}' must be a timm model, got {architecture!r}{hint}")
    weights = next((path / file for file in _WEIGHT_FILES if (path / file).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"backbone folder '{path}' must contain one of {', '.join(_WEIGHT_FILES)}")
    # older files have the entries of `pretrained_cfg` at the top level
    pretrained_cfg = config.get("pretrained_cfg")
    if not isinstance(pretrained_cfg, dict):
        pretrained_cfg = config
    timm_cfg = timm.get_pretrained_cfg(architecture)
    has_fixed_size = timm_cfg is not None and bool(timm_cfg.fixed_input_size)
    return weights, bool(pretrained_cfg.get("fixed_input_size", has_fixed_size))


_logger = logging.getLogger(__name__)
_PROBE_TIMEOUT_S = 5.0
_NETWORK_ERRORS = {"NetworkError", "TimeoutException", "ProxyError", "RemoteProtocolError"}
"""Names of the connection and timeout errors of the Hub's client, which is httpx or httpx2."""


def create_from_hub(name: str, *, pretrained: bool, img_size: int | None = None, **options: Any) -> nn.Module:
    """Create the timm model `name` with files from the Hugging Face Hub or its local cache.

    If the Hub does not answer one short request, only the cache is used, because the Hub client would retry each file
    for 30 seconds.

    Args:
        name: timm name or `hf-hub:owner/repo`.
        pretrained: Load weights. The configuration of an `hf-hub:` name is always read from the Hub or the cache.
        img_size: Input resolution; ignored by models that accept any size.
        **options: Additional arguments of `timm.create_model`.

    Raises:
        ConnectionError: If the Hub is unreachable and the cache lacks the files.
        ValueError: If the Hub does not provide the files, or its URL is invalid.
    """
    with cache_only_if_unreachable() as reason:
        try:
            return timm.create_model(name, pretrained=pretrained, **options, **_hub_size_option(name, img_size))
        except Exception as error:
            names = packaged_names()
            shipped = ""
            if names:
                shipped = f" a backbone from an installed package ({', '.join(names)}; e.g. --backbone {names[0]}),"
            remedy = (
                "Without the Hub, use weights=PATH with a file (.pth, .safetensors, Google's .npz), a local folder in "
                f"the Hub's format as the backbone,{shipped} or pretrained=False for random weights"
            )
            if _is_network_error(error):
                raise ConnectionError(
                    f"the Hub ({constants.ENDPOINT}) could not be reached ({reason or first_line(error).rstrip('.')}) "
                    f"and backbone {name!r} is not cached. {remedy}"
                ) from error
            if isinstance(error, (HfHubHTTPError, HTTPError)):
                raise ValueError(
                    f"the Hub ({constants.ENDPOINT}) does not provide backbone {name!r}: "
                    f"{first_line(error).rstrip('.')}. {remedy}"
                ) from error
            raise


@contextmanager
def cache_only_if_unreachable() -> Iterator[str | None]:
    """Switch the Hub client to offline mode inside the context if one short request fails.

    Yields the reason for offline mode, or None if the Hub answers. A client that was offline before stays offline.

    Raises:
        ValueError: If the Hub's URL is invalid.
    """
    was_offline = constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if was_offline else None
    if not was_offline:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)
        except Exception as error:
            if not _is_network_error(error):
                raise ValueError(
                    f"HF_ENDPOINT must be the URL of a Hub, got {constants.ENDPOINT!r}: {first_line(error)}"
                ) from error
            reason = first_line(error).rstrip(".")
            _logger.info("the Hub is unreachable (%s); using the local cache", reason)
    constants.HF_HUB_OFFLINE = reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _is_network_error(error: BaseException | None) -> bool:
    """Return whether `error` or one of its causes is a connection failure."""
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        has_response = getattr(error, "response", None) is not None
        if has_response or isinstance(error, (HTTPError, HfHubHTTPError)):
            return False  # the server answered
        is_from_client = any(kind.__name__ in _NETWORK_ERRORS for kind in type(error).__mro__)
        if is_from_client or isinstance(error, (ConnectionError, TimeoutError, URLError)):
            return True
        error = error.__cause__
    return False


_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_FOLDER_PREFIX = "local-dir:"
_ANY_SIZE = (Beit, Eva, VisionTransformer)
"""Models that need no trial pass in `build_sized`, because they support every multiple of the patch size.
`create_backbone` checks that the size is a multiple."""
SAM_PREFIX = "sam:"
"""Prefix of a path to a SAM (Segment Anything Model) in `create_segmenter`."""


def create_backbone(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    channels: int = 3,
) -> nn.Module:
    """Create a timm model with pre-trained weights and a head of `num_classes` outputs.

    `timm.data.resolve_model_data_config(model)` returns mean, std, interpolation, and the selected input size. A head
    with a different number of classes is replaced by a randomly initialized one. All other tensors must match. Position
    embeddings are resampled if the input size differs.

    Args:
        name: timm name (`vit_base_patch16_224.augreg_in21k`, or `hf-hub:owner/repo`), backbone registered by a package
            (`packaged_names()`), folder in the Hub's timm format (`config.json` and `model.safetensors` or
            `pytorch_model.bin`), or weight file of a ViT, Swin, or ConvNeXt whose architecture is inferred from its
            shapes.
        num_classes: Number of outputs; 0 removes the head.
        weights: Weight file (`.pth`, `.pth.tar`, `.pt`, `.bin`, `.safetensors`, Google's `.npz`) for the architecture
            `name`, loaded regardless of `pretrained` and without the Hub. For known publishers (Google, MAE,
            MoCo v3, Microsoft's Swin, Facebook's ConvNeXt), images are normalized as in pre-training.
        pretrained: False uses random weights, which need no package and need the Hub only for `hf-hub:` names.
        img_size: Input resolution in pixels; None uses the resolution of the weights or, if `weights` is given, the
            default resolution of `name`.
        channels: Number of image channels. Values other than 3 adapt the first convolution as in timm: its weights are
            summed for one channel, and otherwise repeated and scaled by 3 / channels. Mean and standard deviation are
            averaged for one channel, and otherwise repeated.

    Raises:
        ValueError: If the name is unknown, weights do not fit, `img_size` is not a multiple of the patch size, or an
            argument is out of range.
        NotImplementedError: If a `.npz` file is not a plain ViT, or the first convolution cannot be adapted.
        FileNotFoundError: If a path does not exist.
        ImportError: If a registered backbone needs a package that is not installed.
        ConnectionError: If the Hub is needed and cannot be reached.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no head) or more, got {num_classes}")
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    options: dict[str, Any] = {"num_classes": num_classes}
    packaged = plugin("backbones", name, _timm_names())
    is_on_hub = name.startswith(_HUB_PREFIXES)
    path = None if packaged is not None or is_on_hub else as_path(name)
    if weights is not None and (packaged is not None or is_on_hub or path is not None):
        raise ValueError(
            f"weights must be omitted because backbone {name!r} includes weights, got {weights!r}; "
            "pass the architecture's timm name with weights=PATH"
        )
    if packaged is not None:
        model = _build(packaged.architecture, options, img_size)
        if pretrained:
            packaged.load(model)
    elif is_on_hub:
        model = create_from_hub(name, pretrained=pretrained, img_size=img_size, **options)
    elif path is not None:
        model = _from_path(path, name, options, pretrained, img_size)
    elif weights is not None:
        timm_name = _resolve_name(name)
        checkpoint = read_checkpoint(expand_user(weights))
        # a fine-tuned MAE model has a norm after pooling
        has_norm_after = "fc_norm.weight" in checkpoint.state and "norm.weight" not in checkpoint.state
        is_vit = is_model_in_modules(timm_name.partition(".")[0], ["vision_transformer"])
        pooling = {"global_pool": "avg"} if has_norm_after and is_vit else {}
        model = _store_arguments(_build(timm_name, options | pooling, img_size), pooling)
        load_weights(model, checkpoint, name=name)
    elif pretrained:
        timm_name = _resolve_name(name)
        cfg = timm.get_pretrained_cfg(timm_name)
        if cfg is None or not cfg.has_weights:
            raise ValueError(
                f"timm has no pre-trained weights for backbone {timm_name!r}; pass a file with weights=PATH or "
                "use random weights with pretrained=False"
            )
        model = create_from_hub(timm_name, pretrained=True, img_size=img_size, **options)
    else:
        model = _build(_resolve_name(name), options, img_size)
    return _with_channels(_set_input_size(model, name, img_size), name, channels)


def build_sized(build: Callable[[], nn.Module], name: str, img_size: int | None) -> nn.Module:
    """Build a model, and test it on a blank image if it might not support `img_size`.

    Raises:
        ValueError: If the model does not support `img_size`; timm reports this with various exceptions.
    """
    if img_size is None:
        return build()
    try:
        model = build()
        encoder = getattr(model, "encoder", model)
        was_training = model.training
        if type(encoder).__module__.startswith("timm.") and not isinstance(encoder, _ANY_SIZE):
            with torch.no_grad():
                model.eval()(torch.zeros(1, *resolve_model_data_config(model)["input_size"]))
            model.train(was_training)
        return model
    except (NotImplementedError, torch.OutOfMemoryError):  # RuntimeErrors that do not concern the size
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"img_size must be a size that backbone {name!r} supports, got {img_size} "
            f"({type(error).__name__}: {first_line(error)}); leave it out for the default size"
        ) from error


def _from_path(path: Path, name: str, options: dict[str, Any], pretrained: bool, img_size: int | None) -> nn.Module:
    """Build a model from a folder in the Hub's format, or from a weight file whose architecture is inferred."""
    if path.is_dir():
        weights, has_fixed_size = _read_folder(path)
        size: dict[str, Any] = {"img_size": img_size} if has_fixed_size and img_size is not None else {}
        try:
            model = timm.create_model(f"{_FOLDER_PREFIX}{path}", pretrained=False, **options, **size)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if size:
                raise  # the size may be the cause, which `build_sized` reports
            raise ValueError(
                f"'{path / 'config.json'}' does not describe a timm model ({type(error).__name__}: {first_line(error)})"
            ) from error
        if pretrained:
            load_weights(model, read_checkpoint(weights), name=name)
        return model
    checkpoint = read_checkpoint(path)
    inferred = infer_architecture(checkpoint, source=name)
    side = inferred.img_size if img_size is None else img_size
    model = _store_arguments(_build(inferred.name, options | inferred.options, side), inferred.options)
    if pretrained:
        load_weights(model, checkpoint, name=inferred.name)
    return _set_input_size(model, inferred.name, side)


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the `timm.create_model` arguments stored in a model, except the number of classes and the image size."""
    config = getattr(model, "pretrained_cfg", None) or {}
    arguments = {**(getattr(model, "pretrained_model_args", None) or {}), **(config.get("model_args") or {})}
    return {name: value for name, value in arguments.items() if name not in ("num_classes", "img_size")}


def _store_arguments(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Add model arguments to timm's `model_args`, so that the model can be rebuilt from its config."""
    if arguments:
        update_config(model, model_args={**model_arguments(model), **arguments})
    return model


def _build(name: str, options: dict[str, Any], img_size: int | None) -> nn.Module:
    """Build a model with random weights."""
    return timm.create_model(name, pretrained=False, **options, **_size_option(name, img_size))


def _size_option(name: str, img_size: int | None) -> dict[str, Any]:
    """Return `img_size` for models with a fixed input size, and no option for models that accept any size."""
    cfg = timm.get_pretrained_cfg(name) if img_size is not None else None
    return {"img_size": img_size} if cfg is not None and cfg.fixed_input_size else {}


def _hub_size_option(name: str, img_size: int | None) -> dict[str, Any]:
    """Return the option of `_size_option`; for an `hf-hub:` name, read the repository's configuration."""
    if img_size is None or not name.startswith(_HUB_PREFIXES):
        return _size_option(name, img_size)
    config, architecture, _ = load_model_config_from_hf(name.partition(":")[2])
    return {"img_size": img_size} if config.get("fixed_input_size") else _size_option(architecture, img_size)


def _set_input_size(model: nn.Module, name: str, img_size: int | None) -> nn.Module:
    """Set the input size in the model's data config, which transforms read, and return the model.

    Raises ValueError if the size is not a multiple of the patch size.
    """
    if img_size is None:
        return model
    patch_shape = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch_size = patch_shape[0] if isinstance(patch_shape, tuple) else patch_shape
    if patch_size is not None and img_size % patch_size:
        lower = img_size // patch_size * patch_size
        near = [size for size in (lower, lower + patch_size) if size > 0]
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch_size} of {name!r}, got {img_size}; "
            f"nearest: {', '.join(map(str, near))}"
        )
    channels = model_arguments(model).get("in_chans", 3)
    update_config(model, input_size=(channels, img_size, img_size), test_input_size=None)
    return model


def _with_channels(model: nn.Module, name: str, channels: int) -> nn.Module:
    """Adapt the first convolution, mean, standard deviation, and input size of a model to `channels` in place."""
    own_channels = model_arguments(model).get("in_chans", 3)
    if channels == own_channels:
        return model
    if own_channels != 3:
        raise ValueError(f"channels must be {own_channels} for backbone {name!r}, got {channels}")
    config = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    first_conv = config.get("first_conv") or ()
    conv_names = (first_conv,) if isinstance(first_conv, str) else tuple(first_conv)
    convolutions = [model.get_submodule(conv_name) for conv_name in conv_names]
    if not convolutions or not all(isinstance(conv, nn.Conv2d) and conv.in_channels == 3 for conv in convolutions):
        raise NotImplementedError(
            f"channels must be 3 for backbone {name!r}, whose first convolution is unknown, got {channels}"
        )
    for convolution in cast(list[nn.Conv2d], convolutions):
        convolution.weight = nn.Parameter(adapt_input_conv(channels, convolution.weight.data))
        convolution.in_channels = channels
    for key in ("mean", "std"):
        values = config[key]
        repeated = tuple(values[k % 3] for k in range(channels))
        if channels == 1:
            repeated = (sum(values) / 3,)
        update_config(model, **{key: repeated})
    update_config(model, input_size=(channels, *config["input_size"][1:]))
    return _store_arguments(model, {"in_chans": channels})


def as_path(name: str, *, must_exist: bool = True) -> Path | None:
    """Return `name` as a path, or None if it is a model name.

    Raises:
        FileNotFoundError: If the path is missing and `must_exist` is set.
    """
    if name.startswith(_FOLDER_PREFIX):
        path = expand_user(name.removeprefix(_FOLDER_PREFIX))
    else:
        path = expand_user(name)
        looks_like_path = weight_suffix(path) in WEIGHT_SUFFIXES or "/" in name or "\\" in name
        if not looks_like_path and (timm.is_model(name) or not path.exists()):
            return None
    if must_exist and not path.exists():
        near = _similar_backbones(name)
        hint = f"; similar backbones: {', '.join(map(repr, near))}" if near else ""
        raise FileNotFoundError(
            f"backbone {name!r}: no such file or folder; write a Hub repository as 'hf-hub:owner/name'{hint}"
        )
    return path


def _resolve_name(name: str) -> str:
    """Return timm's current name for `name`, or raise ValueError with the nearest names."""
    name = get_deprecated_models().get(name) or name
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        names = [*timm.list_pretrained(f"{architecture}.*"), *packaged_names()]
        tags = [full.partition(".")[2] for full in names if full.partition(".")[0] == architecture]
        if not tag or tag in tags:
            return name
        near = difflib.get_close_matches(tag, tags, n=5, cutoff=0.0)
        known = ", ".join(repr(f"{architecture}.{near_tag}") for near_tag in near) or "none"
        raise ValueError(f"unknown weights {tag!r} of backbone {architecture!r}; available: {known}")
    names = [*timm.list_models(), *timm.list_pretrained(), *packaged_names()]
    lower = name.lower()
    containing = [known for known in {*names} if lower in known]
    containing.sort(key=lambda known: (not known.startswith(lower), len(known), known))
    near = _similar_backbones(name) or containing[:5] or difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"nearest: {', '.join(map(repr, near))}" if near else "timm.list_models() lists all names"
    accepted = ", ".join(["a local file or folder", *packaged_names()])
    raise ValueError(f"unknown backbone {name!r}; {hint}. Also accepted: {accepted}")


_WELL_KNOWN = (
    *("vit_base_patch16_224.augreg_in21k", "vit_small_patch16_224.augreg_in21k", "vit_large_patch16_224.augreg_in21k"),
    *("vit_base_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_dinov3.lvd1689m"),
    *("vit_base_patch16_clip_224.openai", "vit_base_patch16_siglip_224.webli", "vit_base_patch16_224.mae"),
    *("deit3_base_patch16_224.fb_in22k_ft_in1k", "beitv2_base_patch16_224.in1k_ft_in22k"),
    *("swin_base_patch4_window7_224.ms_in22k", "swin_tiny_patch4_window7_224.ms_in1k"),
    *("convnext_base.fb_in22k", "convnext_tiny.fb_in22k", "resnet50.a1_in1k", "resnet18.a1_in1k", "resnet101.a1h_in1k"),
    *("efficientnet_b0.ra_in1k", "mobilenetv3_large_100.ra_in1k"),
)
"""Pre-trained models suggested for a family name, most common first."""
_LETTERS = {"base": "b", "small": "s", "large": "l", "tiny": "t", "patch": ""}
"""Abbreviations in the names that papers and other libraries use: ViT-B/16, vit_b_16."""


def _similar_backbones(name: str) -> list[str]:
    """Return up to five well-known or packaged models whose names contain `name`, prefix matches first."""
    query = re.sub(r"[^a-z0-9]", "", name.lower())
    ranked = []
    for known in (*_WELL_KNOWN, *packaged_names()):
        short = re.sub("|".join(_LETTERS), lambda match: _LETTERS[match[0]], known)
        forms = [re.sub(r"[^a-z0-9]", "", form) for form in (known, short)]
        if query and any(query in form for form in forms):
            is_prefix = any(form.startswith(query) for form in forms)
            ranked.append((not is_prefix, known))
    return [known for _, known in sorted(ranked, key=lambda pair: pair[0])][:5]

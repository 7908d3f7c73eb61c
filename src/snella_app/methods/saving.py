"""Save trained parameters as an adapter, and load them into a fresh backbone.

An adapter is a folder that contains the trained parameters and the settings for applying them, but not the backbone.
"""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snella.compat.sparse_file import tensors_bytes, tensors_digest
from snella.config import read_config
from snella_app.files import sha256_of, write_bytes
from snella_app.methods.method import MethodSpec
from snella_app.methods.model_parts import AdapterFileError
from snella_app.methods.peft_methods import full_size_factors, inject, without_harmless_warnings
from snella_app.methods.registry import METHODS, parse_method, restore_method, spec_of
from snella_app.text import listed

METHOD_FILE = "method.json"
"""File with the name and options of the method, and the name of the head."""
TENSOR_FILE = "trainable.safetensors"
"""File with the trained parameters of methods that are not PEFT adapters."""
REMEDY = "copy the adapter again, or train again with `--overwrite`"
"""Remedy in errors about damaged or incomplete adapters."""
_TENSORS_DIGEST = "sha256"
_SETTINGS_DIGEST = "settings_sha256"
_SHOWN = 3  # maximum number of tensors named per problem

_logger = logging.getLogger(__name__)


def save_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the trained parameters, without the backbone.

    PEFT models are saved as a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), others as
    `trainable.safetensors`. In both cases, `method.json` describes the method. Each file is written atomically, the
    tensors last. The tensor file's metadata contains SHA-256 digests of the tensors and of the settings file, which is
    `adapter_config.json` for PEFT models and `method.json` for others.

    Args:
        model: Model from `build_method` or `load_trained`.
        folder: Output folder, which is created if it is missing.
    """
    target = Path(folder)
    spec = spec_of(model)
    target.mkdir(parents=True, exist_ok=True)
    tensors, file = _trained_tensors(model)
    if isinstance(model, PeftModel):
        config = copy.copy(model.peft_config["default"])
        config.inference_mode = True
        with full_size_factors(config):
            settings = _json_value(config.to_dict())
        write_bytes(target / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True).encode())
    method_info = {"format": 1, "method": spec.name, "options": _json_value(spec.options), "head": spec.head}
    settings_file = CONFIG_NAME if isinstance(model, PeftModel) else METHOD_FILE
    write_bytes(target / METHOD_FILE, json.dumps(method_info, indent=2).encode() + b"\n")
    write_bytes(target / file, _as_safetensors(tensors, sha256_of(target / settings_file)))
    for name in {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, TENSOR_FILE} - {settings_file, file}:
        (target / name).unlink(missing_ok=True)  # left by an adapter of the other kind


def load_trained(folder: str | os.PathLike[str], backbone: nn.Module) -> nn.Module:
    """Load a saved adapter into a backbone.

    Args:
        folder: Folder written by `save_trained`, or any PEFT adapter in safetensors format.
        backbone: Model that the adapter was trained on, with a head for the same number of classes. It is changed in
            place.

    Returns:
        The model in evaluation mode. Its outputs are bit-identical to the saved model's.

    Raises:
        FileNotFoundError: If the folder contains no adapter, or a file of the adapter is missing.
        AdapterFileError: If a file is damaged or altered, does not fit the model, or contains non-finite values.
        ValueError: If the method or an option is unknown, or the method cannot be applied to the backbone.
        TypeError, NotImplementedError: Under the same conditions as `inject`.
    """
    source = Path(folder)
    if (source / CONFIG_NAME).is_file():
        model = _rebuild_adapter(source, backbone)
    elif (source / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"no adapter file {source / CONFIG_NAME}; {REMEDY}")
    elif (source / METHOD_FILE).is_file():
        info = _read_method(source)
        tensors = _read_tensors(source / TENSOR_FILE)
        model = restore_method(info["method"], backbone, tensors, head=info["head"], **info["options"])
    else:
        raise FileNotFoundError(
            f"{source} contains no adapter: it has neither {CONFIG_NAME} nor {METHOD_FILE}; {REMEDY}"
        )
    load_trained_into(model, source)
    return model.eval()


def load_trained_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load saved values into a model built with the same method and options.

    Raises:
        FileNotFoundError: If the folder contains no tensors.
        AdapterFileError: If a file is damaged or altered, or the tensors do not fit the model or are not finite. The
            model is left unchanged.
        ValueError: If no method was applied to the model.
    """
    targets, file = _trained_tensors(model)
    path = Path(folder) / file
    tensors = _read_tensors(path)
    _check_fits(path, tensors, targets)
    if isinstance(model, PeftModel):
        with full_size_factors(model.peft_config["default"]), without_harmless_warnings():
            set_peft_model_state_dict(model, tensors)
        return
    for name, value in tensors.items():
        targets[name].data.copy_(value)


def _read_method(folder: Path) -> dict[str, Any]:
    """Read the method, its options and the name of the head from `method.json`, and check their types."""
    info = _read_settings(folder / METHOD_FILE)
    if missing := {"method", "options", "head"} - info.keys():
        raise AdapterFileError(f"{folder / METHOD_FILE} is damaged: {min(missing)!r} is missing; {REMEDY}")
    for key, kind in (("method", str), ("options", dict), ("head", str)):
        if not isinstance(info[key], kind):
            problem = f"{key!r} must be a {kind.__name__}, got {info[key]!r:.60}"
            raise AdapterFileError(f"{folder / METHOD_FILE} is damaged: {problem}; {REMEDY}")
    return info


def _rebuild_adapter(folder: Path, backbone: nn.Module) -> nn.Module:
    """Inject the adapter saved in `folder` into `backbone`, without loading its values."""
    _read_settings(folder / CONFIG_NAME)
    _read_metadata(folder / SAFETENSORS_WEIGHTS_NAME)  # rejects altered settings before they are used
    with without_harmless_warnings():
        config = read_config(folder)
    config.inference_mode = False
    model = inject(backbone, config)
    name = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    spec = MethodSpec(name, family=name if name in METHODS else "")
    if (folder / METHOD_FILE).is_file():
        info = _read_method(folder)
        family = spec.family if info["method"] == name else parse_method(info["method"])[0]
        spec = MethodSpec(info["method"], info["options"], info["head"], family)
    model.snella_method = spec  # type: ignore[assignment]
    return model


def _read_settings(path: Path) -> dict[str, Any]:
    """Read an adapter's settings file, which must contain a mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged: {error}; {REMEDY}") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} is damaged: it must contain a mapping, got {values!r:.60}; {REMEDY}")
    return values


def _trained_tensors(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the tensors to save, by name, and the name of their file.

    For PEFT models, these are the tensors that PEFT saves. For others, they are the trained parameters, the
    `saved_buffers` of modules, and, with full fine-tuning, all persistent buffers (such as running statistics).
    """
    if isinstance(model, PeftModel):
        with full_size_factors(model.peft_config["default"]):
            return dict(get_peft_model_state_dict(model)), SAFETENSORS_WEIGHTS_NAME
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        for buffer in getattr(module, "saved_buffers", ()):
            tensors[f"{name}.{buffer}" if name else buffer] = module.get_buffer(buffer)
    if spec_of(model).family == "full":
        persistent = model.state_dict().keys()
        tensors.update((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    return tensors, TENSOR_FILE


def _check_fits(path: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Check that tensors have the names and shapes of the model's `targets`, and are finite where `targets` are.

    Some tensors of a model, such as attention masks in buffers, contain `-inf`.
    """
    common = [name for name in targets if name in tensors]
    shapes = {name: (list(tensors[name].shape), list(targets[name].shape)) for name in common}
    different = [
        f"{name!r} is {stored} in the file and {expected} in the model"
        for name, (stored, expected) in shapes.items()
        if stored != expected
    ]
    missing = targets.keys() - tensors.keys()
    extra = tensors.keys() - targets.keys()
    errors: list[str] = []
    if different:
        errors.append(listed(different, _SHOWN))
    if missing:
        errors.append(f"the file lacks {listed(map(repr, sorted(missing)), _SHOWN)}")
    if extra:
        errors.append(f"the model lacks {listed(map(repr, sorted(extra)), _SHOWN)}")
    if errors:
        raise AdapterFileError(
            f"{path} belongs to another model: {'; '.join(errors)}; load it into the architecture it was trained on"
        )
    for name, value in tensors.items():
        invalid = ~torch.isfinite(value)
        if invalid.any() and (invalid & torch.isfinite(targets[name].detach().cpu())).any():
            raise AdapterFileError(
                f"{path} is damaged: {int(invalid.sum())} of {value.numel()} values in {name!r} are not finite; "
                f"{REMEDY}"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, and verify the digests in its metadata."""
    metadata = _read_metadata(path)
    tensors = load_file(path)
    if _TENSORS_DIGEST not in metadata:
        _logger.warning("note: %s has no SHA-256 digest; its integrity cannot be checked", path)
    elif metadata[_TENSORS_DIGEST] != tensors_digest(tensors):
        raise AdapterFileError(
            f"{path} is damaged: its values were altered after it was written (SHA-256 differs); {REMEDY}"
        )
    return tensors


def _read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a tensor file. If it contains digests, verify the settings file."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}; {REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is damaged: {error} ({path.stat().st_size} bytes); {REMEDY}") from None
    if _TENSORS_DIGEST not in metadata:
        return metadata
    settings = _settings_file(path.parent)
    if not settings.is_file():
        raise AdapterFileError(f"{path} has no settings file {settings.name}; {REMEDY}")
    if metadata.get(_SETTINGS_DIGEST) != sha256_of(settings):
        raise AdapterFileError(
            f"{settings} is damaged: it was altered after the adapter was saved (SHA-256 differs); {REMEDY}"
        )
    return metadata


def _settings_file(folder: Path) -> Path:
    """Return the path of the settings file of an adapter, which depends on whether it is a PEFT adapter."""
    path = folder / CONFIG_NAME
    return path if path.is_file() else folder / METHOD_FILE


def _as_safetensors(tensors: dict[str, Tensor], settings_digest: str) -> bytes:
    """Serialize tensors to bytes. Safetensors' `save_file` is not used, because it loses the errno of a full disk."""
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _TENSORS_DIGEST: tensors_digest(values), _SETTINGS_DIGEST: settings_digest}
    return tensors_bytes(values, metadata)


def _json_value(value: Any) -> Any:
    """Convert a value for JSON: sets to sorted lists, enums to their values."""
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_json_value(inner) for inner in value)
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return getattr(value, "value", value)

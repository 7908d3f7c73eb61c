"""Saving what a method trained, and putting it back onto a fresh backbone."""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save
from torch import Tensor, nn

from snella.methods.adalora import all_ranks
from snella.methods.adapter_files import WAY_OUT, AdapterFileError, check_fits, read_header
from snella.methods.building import restore_method, spec_of
from snella.methods.method import MethodSpec
from snella.methods.peft_adapter import inject, without_harmless_warnings
from snella.methods.registry import METHODS, parse_method

METHOD_FILE = "method.json"
TENSOR_FILE = "trainable.safetensors"


def save_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what was trained, and nothing of the backbone.

    PEFT models become a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), others
    `trainable.safetensors` and `method.json`. Each file is written under a temporary name and renamed.

    Args:
        model: From `build_method` or `load_trained`.
        folder: Created if it is not there.
    """
    target = Path(folder)
    spec = spec_of(model)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        config = copy.copy(model.peft_config["default"])
        config.inference_mode = True
        with all_ranks(config), tempfile.TemporaryDirectory(dir=target, prefix=".config-") as folder_for_config:
            config.save_pretrained(folder_for_config)
            _publish(Path(folder_for_config) / CONFIG_NAME, target / CONFIG_NAME)
        _write(_as_safetensors(_adapter_tensors(model)), target / SAFETENSORS_WEIGHTS_NAME)
    else:
        _write(_as_safetensors(_own_tensors(model)), target / TENSOR_FILE)
    described = {"format": 1, "method": spec.name, "options": _plain(spec.options), "head": spec.head}
    _write(json.dumps(described, indent=2).encode() + b"\n", target / METHOD_FILE)


def load_trained(folder: str | os.PathLike[str], backbone: nn.Module) -> nn.Module:
    """Put a saved adapter onto a backbone.

    Args:
        folder: As written by `save_trained`, or any PEFT adapter.
        backbone: The model it was trained on, with a head of as many classes; changed in place.

    Returns:
        The model in evaluation mode, with outputs equal bit for bit to those of the saved one.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        AdapterFileError: The file is damaged or belongs to another model; names the tensor.
    """
    source = Path(folder)
    if (source / CONFIG_NAME).is_file():
        model = _rebuild_adapter(source, backbone)
    elif (source / METHOD_FILE).is_file():
        described = _read_settings(source / METHOD_FILE)
        read_header(source / TENSOR_FILE)
        tensors = load_file(source / TENSOR_FILE)
        model = restore_method(described["method"], backbone, tensors, head=described["head"], **described["options"])
    else:
        raise FileNotFoundError(
            f"{source} holds no adapter: neither {CONFIG_NAME} nor {METHOD_FILE} is there; {WAY_OUT}"
        )
    load_trained_into(model, source)
    return model.eval()


def load_trained_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load saved values into a model that `build_method` made in the same way.

    Raises:
        FileNotFoundError: The folder holds no tensors.
        AdapterFileError: The file is damaged or belongs to another model; names the tensor, and leaves the model as
            it was.
    """
    if isinstance(model, PeftModel):
        path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        _check(path, _adapter_tensors(model))
        with all_ranks(model.peft_config["default"]), without_harmless_warnings():
            set_peft_model_state_dict(model, load_file(path))
        return
    path = Path(folder) / TENSOR_FILE
    own = _own_tensors(model)
    _check(path, own)
    for name, value in load_file(path).items():
        own[name].data.copy_(value)


def _rebuild_adapter(folder: Path, backbone: nn.Module) -> nn.Module:
    """The adapter of `folder` around `backbone`, values still to be loaded."""
    _read_settings(folder / CONFIG_NAME)
    with without_harmless_warnings():
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model = inject(backbone, config)
    method = folder / METHOD_FILE
    described: dict[str, Any] = _read_settings(method) if method.is_file() else {}
    name = described.get("method", str(getattr(config.peft_type, "value", config.peft_type)).lower())
    family = parse_method(name)[0] if "method" in described else (name if name in METHODS else "")
    model.snella_method = MethodSpec(name, described.get("options", {}), described.get("head", "head"), family)  # type: ignore[assignment]
    return model


def _read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise AdapterFileError(f"{path} is damaged: {fault}; {WAY_OUT}") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} is damaged: it must hold a mapping, got {values!r:.60}; {WAY_OUT}")
    return values


def _adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Tensors of the adapter under the names of its file."""
    with all_ranks(model.peft_config["default"]):
        return dict(get_peft_model_state_dict(model))


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, buffers that say where they belong, and with full fine-tuning all buffers (statistics)."""
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        for buffer in getattr(module, "saved_buffers", ()):
            tensors[f"{name}.{buffer}" if name else buffer] = module.get_buffer(buffer)
    if spec_of(model).family == "full":
        kept = model.state_dict().keys()
        tensors.update((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    return tensors


def _check(path: Path, wanted: dict[str, Tensor]) -> None:
    """Compare a file's header with the model before anything is loaded."""
    check_fits(path, read_header(path), {name: list(tensor.shape) for name, tensor in wanted.items()})


def _as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a safetensors file (`save_file` itself would hide the errno of a full disk)."""
    seen: set[int] = set()
    values = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        # the format has no tensors that share memory
        values[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return save(values, {"format": "pt"})


def _write(content: bytes, path: Path) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Make a complete file visible under its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """The value as JSON knows it: sets become sorted lists, enums their values."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)

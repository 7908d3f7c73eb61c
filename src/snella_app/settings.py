"""Type checks of settings, and suggestions for names and values from other tools."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from snella_app.text import nearest

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "run": ("model",),
    "backbone": ("model", "model_name", "model_name_or_path", "arch", "architecture"),
    "backbones": ("model",),
    "model": ("model_name", "model_name_or_path"),
    "weights": ("checkpoint", "ckpt"),
    "resume": ("resume_from_checkpoint", "continue"),
    "lr": ("learning_rate", "base_lr", "lr0"),
    "out": ("output_dir", "output", "outdir", "out_dir", "save_dir", "logging_dir", "format"),
    "batch_size": (
        *("batch", "bs", "batchsize", "train_batch_size"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    "batch": ("batch_size",),
    "accumulate": ("gradient_accumulation_steps", "grad_accum"),
    "accumulation": ("gradient_accumulation_steps", "grad_accum"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "max_epochs"),
    "data": ("dataset", "dataset_name", "data_dir", "data_path", "train_dir", "input", "source"),
    "images": ("image", "source", "input"),
    "img_size": ("image_size", "imgsz", "input_size", "resolution"),
    "workers": ("num_workers", "dataloader_num_workers"),
    "weight_decay": ("wd",),
    "r": ("rank", "lora_r", "lora_rank"),
    "scaling": ("alpha",),
    "target_sparsity": ("sparsity",),
    "method": ("peft", "peft_type", "peft_method"),
    "precision": ("dtype", "amp", "fp16", "bf16", "mixed_precision"),
    "grad_checkpointing": ("gradient_checkpointing",),
    "early_stopping": ("patience",),
    "label_smoothing": ("smoothing",),
    "max_grad_norm": ("clip_grad",),
    "val_fraction": ("val_split", "validation_split"),
    "test_fraction": ("test_split",),
    "device": ("gpu", "gpus"),
    "overwrite": ("force",),
    "track": ("report_to", "logger"),
    "augment": ("augmentation", "aug"),
}
"""Names in other tools, by setting of snella."""

_OTHER_VALUES = {
    "bfloat16": "bf16",
    "half": "fp16",
    "float16": "fp16",
    "full": "fp32",
    "float": "fp32",
    "float32": "fp32",
    "semantic-segmentation": "segmentation",
    "image-classification": "classification",
    "multi-class": "classification",
}


class TypeMismatchError(TypeError):
    """Error for a value that does not match its type annotation."""


def describe_type(kind: Any) -> str:
    """Describe a type annotation for error messages: `an integer or auto`."""
    if get_origin(kind) in (Union, UnionType):
        first, *others = (describe_type(part) for part in get_args(kind) if part is not NoneType)
        return " or ".join(text.removeprefix("one of ") for text in (first, *others)) if others else first
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is list:
        return "a list such as [a, b]"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, "settings such as {kernel: rbf}")


def coerce(kind: Any, value: Any) -> Any:
    """Convert a value to its annotated type: paths to strings, NumPy numbers to Python numbers.

    Raises:
        TypeMismatchError: If the value does not match the annotation.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        for part in inner:
            try:
                return coerce(part, value)
            except TypeMismatchError:
                continue
        raise TypeMismatchError
    if origin is Literal:
        is_valid = isinstance(value, str) and value in inner
    elif origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeMismatchError
        return {key: coerce(inner[1], item) for key, item in value.items()}
    elif origin is list:
        if not isinstance(value, list | tuple):
            raise TypeMismatchError
        return [coerce(inner[0], item) for item in value]
    elif kind is bool:
        is_valid = isinstance(value, bool)
    elif kind is int:
        is_valid = isinstance(value, Integral) and not isinstance(value, bool)
        value = int(value) if is_valid else value
    elif kind is float:
        is_valid = isinstance(value, Real) and not isinstance(value, bool)
        value = value if not is_valid or isinstance(value, int) else float(value)
    else:
        value = os.fspath(value) if kind is str and isinstance(value, os.PathLike) else value
        is_valid = isinstance(value, kind)
    if not is_valid:
        raise TypeMismatchError
    return value


def suggest_choice(kind: Any, value: Any) -> str:
    """Suggest the choice closest to an invalid value: `; did you mean bf16?`; empty if none is similar."""
    parts = [kind, *get_args(kind)]
    choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    text = str(value).lower()
    suggestion = _OTHER_VALUES.get(text.replace("_", "-"))
    if suggestion not in choices:
        compact = re.sub(r"[-_ ]", "", text)
        suggestion = next((choice for choice in choices if re.sub(r"[-_ ]", "", choice) == compact), None)
    return f"; did you mean {suggestion}?" if suggestion else nearest(text, choices, form="; did you mean {}?")


def suggest_setting(name: str, spellings: Mapping[str, str]) -> str:
    """Suggest a setting for an unknown name: `use lr` for another tool's name, `nearest: lr, r` for a typo.

    Args:
        name: Unknown name.
        spellings: Known names, with their spelling in the suggestion.
    """
    name = name.replace("-", "_")
    for setting, others in _OTHER_NAMES.items():
        if name in others and setting in spellings:
            return f"use {spellings[setting]}"
    near = difflib.get_close_matches(name, spellings, n=2, cutoff=0.5)
    return f"nearest: {', '.join(spellings[setting] for setting in near)}" if near else ""


def short_repr(value: Any) -> str:
    """Return the `repr` of a value in one line, truncated to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

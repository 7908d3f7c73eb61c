"""Type checks of settings, and suggestions for names and values from other tools."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from numbers import Number
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter

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
    """Check a value against its annotation; paths become strings, tuples lists, and NumPy numbers Python numbers.

    Raises:
        ValueError: If the value does not match the annotation.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, Number) and hasattr(value, "item"):
        value = value.item()
    result = type_adapter(kind).validate_python(value, strict=True)
    return value if type(value) is int and isinstance(result, float) else result  # keeps `1` in files of the settings


@cache
def type_adapter(kind: Any) -> TypeAdapter[Any]:
    """Build pydantic's validator of an annotation, which takes a few milliseconds."""
    return TypeAdapter(kind)


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

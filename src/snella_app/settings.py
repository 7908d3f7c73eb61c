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

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "model": ("run", "backbone", "backbones", "model"),
    "model_name": ("backbone", "model"),
    "model_name_or_path": ("backbone", "model"),
    "arch": ("backbone",),
    "architecture": ("backbone",),
    "checkpoint": ("weights",),
    "ckpt": ("weights",),
    "resume_from_checkpoint": ("resume",),
    "continue": ("resume",),
    "learning_rate": ("lr",),
    "base_lr": ("lr",),
    "lr0": ("lr",),
    "output_dir": ("out",),
    "output": ("out",),
    "outdir": ("out",),
    "out_dir": ("out",),
    "save_dir": ("out",),
    "logging_dir": ("out",),
    "batch": ("batch_size",),
    "bs": ("batch_size",),
    "batchsize": ("batch_size",),
    "batch_size": ("batch",),
    "train_batch_size": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "per_device_eval_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulate", "accumulation"),
    "grad_accum": ("accumulate", "accumulation"),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "n_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "data_dir": ("data",),
    "data_path": ("data",),
    "train_dir": ("data",),
    "input": ("data", "images"),
    "image": ("images",),
    "source": ("images", "data"),
    "image_size": ("img_size",),
    "imgsz": ("img_size",),
    "input_size": ("img_size",),
    "resolution": ("img_size",),
    "num_workers": ("workers",),
    "dataloader_num_workers": ("workers",),
    "wd": ("weight_decay",),
    "rank": ("r",),
    "lora_r": ("r",),
    "lora_rank": ("r",),
    "alpha": ("scaling",),
    "sparsity": ("target_sparsity",),
    "peft": ("method",),
    "peft_type": ("method",),
    "peft_method": ("method",),
    "dtype": ("precision",),
    "amp": ("precision",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "mixed_precision": ("precision",),
    "gradient_checkpointing": ("grad_checkpointing",),
    "patience": ("early_stopping",),
    "smoothing": ("label_smoothing",),
    "clip_grad": ("max_grad_norm",),
    "val_split": ("val_fraction",),
    "validation_split": ("val_fraction",),
    "test_split": ("test_fraction",),
    "gpu": ("device",),
    "gpus": ("device",),
    "force": ("overwrite",),
    "report_to": ("track",),
    "logger": ("track",),
    "augmentation": ("augment",),
    "aug": ("augment",),
    "format": ("out",),
}
"""Names used by other tools, with the corresponding settings of snella."""

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
    if kind is Any or (kind is NoneType and value is None):
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
    equivalent = next((setting for setting in OTHER_NAMES.get(name, ()) if setting in spellings), None)
    if equivalent is not None:
        return f"use {spellings[equivalent]}"
    near = difflib.get_close_matches(name, spellings, n=2, cutoff=0.5)
    return f"nearest: {', '.join(spellings[setting] for setting in near)}" if near else ""


def short_repr(value: Any) -> str:
    """Return the `repr` of a value in one line, truncated to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The memory of a training step by SNELLA, by LoRA and in full, side by side, before any run."""

from collections.abc import Iterator

import torch
from timm.data import resolve_model_data_config

from snella.backbones import create_backbone
from snella.methods import build_method
from snella.training.memory import StepMemory, predict_step_memory

_CLASSES = 100
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def methods_compared(r: int) -> list[str]:
    """The methods that `predict_for_methods` goes through, for ranks of `r`."""
    return [f"snella-{r}", f"lora-{r}", "full"]


def predict_for_methods(
    backbone: str,
    batch: int = 32,
    *,
    img_size: int | None = None,
    r: int = 8,
    dtype: str = "fp32",
    device_type: str = "cpu",
) -> Iterator[tuple[str, tuple[int, int, int], StepMemory]]:
    """Yield method, `(channels, height, width)` and memory, one method after the other; a model at a time is built.

    The models have random weights and a head of 100 classes, and are built on the CPU.

    Args:
        backbone: As for `create_backbone`.
        batch: Images per step.
        img_size: Side of the input in pixels; the backbone's own if None.
        r: Rank of SNELLA's and LoRA's factors.
        dtype: Of weights and activations; PEFT keeps the adapters themselves in float32.
        device_type: Where the training is to run.

    Raises:
        ValueError: A number below 1, an unknown `dtype` or backbone; all but the latter before a model is built.
    """
    faults = [
        f"{name} must be at least 1, got {value}"
        for name, value in (("batch", batch), ("img_size", img_size), ("r", r))
        if value is not None and value < 1
    ]
    if dtype not in _DTYPES:
        faults.append(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if faults:
        raise ValueError("; ".join(faults))
    return _predict_each(backbone, batch, img_size, r, _DTYPES[dtype], device_type)


def _predict_each(
    backbone: str, batch: int, img_size: int | None, r: int, dtype: torch.dtype, device_type: str
) -> Iterator[tuple[str, tuple[int, int, int], StepMemory]]:
    """The work of `predict_for_methods`."""
    for method in methods_compared(r):
        model = create_backbone(backbone, num_classes=_CLASSES, pretrained=False, img_size=img_size).to(dtype)
        channels, height, width = resolve_model_data_config(model)["input_size"]
        model = build_method(method, model)
        shape = (channels, height, width)
        yield method, shape, predict_step_memory(model, shape, batch, device_type=device_type)

"""Hardware rates, and step time predicted from the counts of `cost_model`.

On a CPU, calls run one after another:

    seconds = FLOP / product + vector operations / vector + bytes moved / memory + calls · call_s

On a GPU the host launches kernels in parallel with the device:

    device  = FLOP / product + vector operations / vector + bytes moved / memory + serial instructions / issue
    seconds = max(device, calls · call_s)

`benchmarks/cost_model.py` fits the rates of CPUs to measured steps. Rates of GPUs are datasheet values.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from snella_app.training.cost_model import TRITON, Precision, StepCount, Transformer, count_step


@dataclass(frozen=True)
class Rates:
    """Achieved rates of a machine.

    Args:
        product: FLOP/s of matrix products in the dtype of the activations.
        half_product: FLOP/s of matrix products in bfloat16.
        vector: Elementwise operations per second.
        memory: Bytes per second.
        call_s: Seconds per call or launch.
        issue: Instructions per second of one warp.
        overlaps: True if calls run in parallel with the device.
    """

    product: float
    half_product: float
    vector: float
    memory: float
    call_s: float
    issue: float = math.inf
    overlaps: bool = False

    def seconds(self, step: StepCount) -> float:
        """Return the time of a step on one device, in seconds."""
        device = step.products / self.product + step.half_products / self.half_product
        device += (step.vector + step.merge_vector) / self.vector + (step.moved + step.merge_moved) / self.memory
        device += step.merge_serial / self.issue
        host = (step.calls + step.merge_calls) * self.call_s
        return max(device, host) if self.overlaps else device + host

    def merge_seconds(self, step: StepCount) -> float:
        """Return the time of merging without the weight gradient, in seconds."""
        device = step.merge_vector / self.vector + step.merge_moved / self.memory + step.merge_serial / self.issue
        return device if self.overlaps else device + step.merge_calls * self.call_s


@dataclass(frozen=True)
class Gpu:
    """Datasheet values of a GPU.

    Args:
        name: Product name.
        product: Peak FLOP/s of dense products in bfloat16 (float16 on a T4), without sparsity.
        vector: Peak FLOP/s in float32 without tensor cores; a multiply-add counts as two.
        memory: Peak bytes per second.
        link: Bytes per second to other GPUs, one direction.
        clock: Boost clock in Hz.
        source: Datasheet.
    """

    name: str
    product: float
    vector: float
    memory: float
    link: float
    clock: float
    source: str


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 SXM", 989e12, 66.9e12, 3.35e12, 450e9, 1.98e9, "NVIDIA H100 datasheet"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12, 300e9, 1.41e9, "NVIDIA A100 datasheet"),
    "rtx4090": Gpu(
        "RTX 4090", 165e12, 82.6e12, 1.01e12, 32e9, 2.52e9, "NVIDIA Ada architecture whitepaper; PCIe 4 ×16"
    ),
    "l4": Gpu("L4", 121e12, 30.3e12, 0.3e12, 32e9, 2.04e9, "NVIDIA L4 datasheet; PCIe 4 ×16"),
    "t4": Gpu("T4", 65e12, 8.1e12, 0.32e12, 16e9, 1.59e9, "NVIDIA T4 datasheet; float16; PCIe 3 ×16"),
    "mi300x": Gpu("MI300X", 1307e12, 163.4e12, 5.3e12, 448e9, 2.1e9, "AMD MI300X datasheet"),
}
"""Datasheet values, neither checked against the datasheets nor measured. L4's datasheet states twice the product rate,
with sparsity."""

EFFICIENCIES = {
    "product": (0.35, 0.5, 0.65),
    "vector": (0.25, 0.5, 0.75),
    "memory": (0.55, 0.7, 0.85),
}
"""Assumed fractions of the peak rates: low, expected, high."""
LAUNCHES = (5e-6, 10e-6, 20e-6)
"""Assumed host seconds per launch of an eager model: low, expected, high."""


def gpu_rates(
    gpu: str, product: int = 1, vector: int = 1, memory: int = 1, launch: int = 1, *, is_float32: bool = False
) -> Rates:
    """Return the rates of a GPU; each of the four levels is 0 (low), 1 (expected) or 2 (high)."""
    peak = GPUS[gpu]
    products = (peak.vector if is_float32 else peak.product) * EFFICIENCIES["product"][product]
    # the datasheet counts a multiply-add, one instruction per lane, as two FLOP
    efficiency = EFFICIENCIES["vector"][vector]
    bandwidth = peak.memory * EFFICIENCIES["memory"][memory]
    return Rates(
        products,
        products,
        peak.vector / 2 * efficiency,
        bandwidth,
        LAUNCHES[launch],
        peak.clock * efficiency,
        overlaps=True,
    )


def rates_range(gpu: str, *, is_float32: bool = False) -> list[Rates]:
    """Return the rates of a GPU under every combination of assumptions."""
    return [gpu_rates(gpu, *levels, is_float32=is_float32) for levels in itertools.product(range(3), repeat=4)]


def ratio_range(gpu: str, step: StepCount, reference: StepCount) -> tuple[float, float, float]:
    """Return the lowest, expected and highest ratio of two step times in bfloat16 over all assumptions."""
    ratios = [rates.seconds(step) / rates.seconds(reference) for rates in rates_range(gpu)]
    expected = gpu_rates(gpu)
    return min(ratios), expected.seconds(step) / expected.seconds(reference), max(ratios)


def predict_on_gpu(
    gpu: str, shape: Transformer, method: str, batch: int, *, r: int = 8, dtype: str = "fp32"
) -> tuple[float, float, float]:
    """Predict the lowest, expected and highest step time with Triton kernels, in seconds.

    `dtype` is `fp32`, or `bf16` for autocast over frozen weights in bfloat16.
    """
    is_float32 = dtype == "fp32"
    precision: Precision = "float32" if is_float32 else "bfloat16"
    step = count_step(shape, method, batch, r=r, precision=precision, kernels=TRITON)
    seconds = [rates.seconds(step) for rates in rates_range(gpu, is_float32=is_float32)]
    return min(seconds), gpu_rates(gpu, is_float32=is_float32).seconds(step), max(seconds)


def shape_of_backbone(backbone: str, img_size: int | None = None, classes: int = 100) -> Transformer | None:
    """Return the shape of a plain timm `VisionTransformer`; None for other models, other blocks and gated MLPs.

    The model is built on the meta device, which allocates no weights.
    """
    from timm.layers import Mlp
    from timm.models.vision_transformer import Block, VisionTransformer

    from snella_app.backbones.create import create_backbone

    options: dict[str, Any] = {"num_classes": classes, "pretrained": False, "img_size": img_size}
    try:
        with torch.device("meta"):
            model = create_backbone(backbone, **options)
    except RuntimeError:  # meta tensors have no values; timm 1.0.20 reads some
        model = create_backbone(backbone, **options)
    block = model.blocks[0] if isinstance(model, VisionTransformer) else None
    if not isinstance(model, VisionTransformer) or type(block) is not Block or type(block.mlp) is not Mlp:
        return None
    attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
    height, width = model.patch_embed.patch_size
    patch = model.patch_embed.proj.in_channels * height * width
    return Transformer(
        width=model.embed_dim,
        depth=len(model.blocks),
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        heads=attention.num_heads,
        hidden=mlp.fc1.out_features,
        patch=patch,
        image=patch * model.patch_embed.num_patches,
        outputs=classes,
        has_layer_scale=not isinstance(block.ls1, nn.Identity),
    )

"""Hardware rates, and step times predicted from the counts of `cost_model`.

The host launches kernels while the device runs earlier ones, and communication overlaps with computation:

    device  = FLOP / product + vector operations / vector + bytes moved / memory + serial instructions / issue
    seconds = max(device, launches · launch_s, bytes sent / link)

DDP reduces gradients during the backward pass, and FSDP2 gathers a block while the previous one is computed. Without
any overlap, a step would take the sum of computation and communication, which is at most twice the maximum. Merging
computes SNELLA's update and adds it to the weight.

`benchmarks/cost_model.py` fits the product, vector, and memory rates of CPUs to measured steps. Rates of GPUs are
datasheet values times assumed efficiencies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from snella_lab.bench.cost_model import TRITON, Precision, StepCount, Strategy, Transformer, count_step

_MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Rates:
    """Achieved rates of a machine.

    Args:
        product: FLOP/s of matrix products in the dtype of the activations.
        half_product: FLOP/s of matrix products in bfloat16.
        vector: Elementwise operations per second.
        memory: Bytes per second.
        launch_s: Host seconds per kernel launch. 0 on a CPU.
        issue: Instructions per second of one warp.
        link: Bytes per second to other devices.
    """

    product: float
    half_product: float
    vector: float
    memory: float
    launch_s: float = 0.0
    issue: float = math.inf
    link: float = math.inf

    def seconds(self, step: StepCount, devices: int = 1, strategy: Strategy = "ddp") -> float:
        """Return the time in seconds of a step that runs on `devices` devices."""
        return max(self._device_seconds(step), self._launch_seconds(step), self.link_seconds(step, devices, strategy))

    def link_seconds(self, step: StepCount, devices: int, strategy: Strategy) -> float:
        """Return the time of communication, in seconds."""
        return step.communicated(devices, strategy) / self.link

    def merge_share(self, step: StepCount) -> float:
        """Return the fraction of a single-device step that merging takes, excluding the weight gradient.

        If launching the kernels takes longer than running them, this is the fraction of launches that merging needs.
        """
        device_s = self._device_seconds(step)
        if self._launch_seconds(step) > device_s:
            return step.merge_launches / (step.launches + step.merge_launches)
        merge_s = step.merge_vector / self.vector + step.merge_moved / self.memory + step.merge_serial / self.issue
        return merge_s / device_s

    def _device_seconds(self, step: StepCount) -> float:
        """Return the time of all kernels on the device."""
        products_s = step.products / self.product + step.half_products / self.half_product
        vector_s = (step.vector + step.merge_vector) / self.vector
        memory_s = (step.moved + step.merge_moved) / self.memory
        serial_s = step.merge_serial / self.issue
        return products_s + (vector_s + memory_s) + serial_s

    def _launch_seconds(self, step: StepCount) -> float:
        """Return the time that the host takes to launch all kernels."""
        return (step.launches + step.merge_launches) * self.launch_s


@dataclass(frozen=True)
class Gpu:
    """Datasheet values of a GPU.

    Args:
        name: Product name.
        product: Peak FLOP/s of dense products in bfloat16 (float16 on a T4), without sparsity.
        vector: Peak FLOP/s in float32 without tensor cores. A multiply-add counts as two.
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
    "h100": Gpu("H100 SXM", 989.4e12, 66.9e12, 3.35e12, 450e9, 1.98e9, "NVIDIA H100 architecture whitepaper"),
    "h200": Gpu("H200 SXM", 989.4e12, 66.9e12, 4.8e12, 450e9, 1.98e9, "NVIDIA H200 datasheet; same compute as H100"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 300e9, 1.41e9, "NVIDIA A100 datasheet"),
    "rtx4090": Gpu(
        "RTX 4090", 165.2e12, 82.6e12, 1.008e12, 32e9, 2.52e9, "NVIDIA Ada architecture whitepaper; PCIe 4 ×16"
    ),
    "l4": Gpu("L4", 121e12, 30.3e12, 0.3e12, 32e9, 2.04e9, "NVIDIA L4 datasheet; PCIe 4 ×16"),
    "t4": Gpu("T4", 65e12, 8.1e12, 0.32e12, 16e9, 1.59e9, "NVIDIA T4 datasheet; float16; PCIe 3 ×16"),
    "mi300x": Gpu("MI300X", 1307.4e12, 163.4e12, 5.3e12, 448e9, 2.1e9, "AMD MI300X datasheet"),
}
"""Values attributed to the datasheets, but neither checked against them nor measured. The datasheets of H200 and L4
state twice the product rate, because they assume sparse matrices."""

EFFICIENCIES = {
    "product": (0.35, 0.5, 0.65),
    "vector": (0.25, 0.5, 0.75),
    "memory": (0.55, 0.7, 0.85),
}
"""Assumed fractions of the peak rates: low, expected, and high."""
_LINK = 0.7  # assumed fraction of the link rate
LAUNCHES = (5e-6, 10e-6, 20e-6)
"""Assumed host seconds per kernel launch in eager mode: low, expected, and high."""


def gpu_rates(
    gpu: str, product: int = 1, vector: int = 1, memory: int = 1, launch: int = 1, *, is_float32: bool = False
) -> Rates:
    """Return the rates of a GPU. If `is_float32` is True, products run without tensor cores.

    Each of the other four arguments is the level of an assumption: 0 (low), 1 (expected), or 2 (high).
    """
    peak = GPUS[gpu]
    vector_efficiency = EFFICIENCIES["vector"][vector]
    return Rates(
        product=(peak.vector if is_float32 else peak.product) * EFFICIENCIES["product"][product],
        half_product=peak.product * EFFICIENCIES["product"][product],
        vector=peak.vector / 2 * vector_efficiency,  # datasheets count a multiply-add, one instruction, as two FLOPs
        memory=peak.memory * EFFICIENCIES["memory"][memory],
        launch_s=LAUNCHES[launch],
        issue=peak.clock * vector_efficiency,
        link=peak.link * _LINK,
    )


def tokens_until(model: Transformer, is_reached: Callable[[int], bool]) -> int | None:
    """Return the size in tokens of the smallest batch that meets a monotonic condition; None if above a million."""
    low = 0
    high = _MAX_TOKENS // model.tokens
    if not is_reached(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if is_reached(middle):
            high = middle
        else:
            low = middle
    return high * model.tokens


@dataclass(frozen=True)
class GpuForecast:
    """Predicted step times of a plain transformer on one GPU with Triton kernels.

    Sparsity does not change the step times, because the Triton kernels compute dense weight gradients.

    Args:
        gpu: Key of `GPUS`.
        shape: Shape of the model.
        batch: Samples per step.
        r: Rank.
        dtype: `fp32`, or `bf16` for autocast with frozen weights in bfloat16.
    """

    gpu: str
    shape: Transformer
    batch: int
    r: int = 8
    dtype: str = "fp32"

    def count(self, method: str, batch: int | None = None) -> StepCount:
        """Count a step, by default at the forecast's batch size."""
        precision: Precision = "float32" if self._is_float32 else "bfloat16"
        batch = self.batch if batch is None else batch
        return count_step(self.shape, method, batch, r=self.r, precision=precision, kernels=TRITON)

    def seconds(self, method: str) -> tuple[float, float, float]:
        """Return the lowest, expected, and highest step time, in seconds."""
        step = self.count(method)
        return self._range(lambda rates: rates.seconds(step))

    def ratio(self, method: str) -> tuple[float, float, float]:
        """Return the lowest, expected, and highest step time relative to LoRA."""
        step = self.count(method)
        lora = self.count("lora")
        return self._range(lambda rates: rates.seconds(step) / rates.seconds(lora))

    def _range(self, value: Callable[[Rates], float]) -> tuple[float, float, float]:
        """Return the lowest, expected, and highest value over all combinations of assumptions."""
        levels = itertools.product(range(3), repeat=4)
        values = [value(gpu_rates(self.gpu, *level, is_float32=self._is_float32)) for level in levels]
        return min(values), value(self._expected), max(values)

    @property
    def merge_share(self) -> float:
        """Expected fraction of a SNELLA step spent on merging."""
        return self._expected.merge_share(self.count("snella"))

    @property
    def crossing(self) -> int | None:
        """Tokens per step from which SNELLA is at least as fast as LoRA, or None if above a million."""
        rates = self._expected

        def is_as_fast(batch: int) -> bool:
            return rates.seconds(self.count("snella", batch)) <= rates.seconds(self.count("lora", batch))

        return tokens_until(self.shape, is_as_fast)

    @property
    def notes(self) -> list[str]:
        """Lines of text with the step-time ratio of SNELLA to LoRA, the share of merging, and the crossing."""
        low, expected, high = self.ratio("snella")
        crossing = self.crossing
        tokens = self.shape.tokens
        if crossing is None:
            faster = "LoRA is faster up to a million tokens per step"
        elif crossing == tokens:
            faster = "SNELLA is at least as fast as LoRA at every batch size"
        else:
            faster = f"below {crossing:,} tokens per step (batch size {crossing // tokens:,}), LoRA is faster"
        return [
            "step is predicted, not measured: datasheet values with a range of efficiencies; "
            "see docs/notes/cost-model.md",
            f"snella takes {expected:.2f} ({low:.2f}–{high:.2f}) times as long as lora; "
            f"merging takes {self.merge_share:.0%} of its step",
            f"{faster}; sparsity does not change the step time on GPUs",
        ]

    @property
    def _is_float32(self) -> bool:
        """True for activations in float32."""
        return self.dtype == "fp32"

    @property
    def _expected(self) -> Rates:
        """Rates under the expected assumptions."""
        return gpu_rates(self.gpu, is_float32=self._is_float32)


def forecast(
    gpu: str, backbone: str, img_size: int | None = None, *, batch: int = 32, r: int = 8, dtype: str = "fp32"
) -> tuple[str, GpuForecast | None]:
    """Return the product name of a GPU and the forecast for a backbone.

    The forecast is None unless the backbone is a plain ViT.
    """
    shape = shape_of_backbone(backbone, img_size)
    return GPUS[gpu].name, None if shape is None else GpuForecast(gpu, shape, batch, r, dtype)


_CLASSES = 100  # outputs of the head


def shape_of_backbone(backbone: str, img_size: int | None = None) -> Transformer | None:
    """Return the shape of a plain timm `VisionTransformer`, or None for a different model, block, or MLP.

    If possible, the model is built on the meta device, which allocates no weights.
    """
    from timm.layers import Mlp
    from timm.models.vision_transformer import Block, VisionTransformer

    from snella_app.backbones.create import create_backbone

    options: dict[str, Any] = {"num_classes": _CLASSES, "pretrained": False, "img_size": img_size}
    try:
        with torch.device("meta"):
            model = create_backbone(backbone, **options)
    except RuntimeError:  # meta tensors have no values, but timm 1.0.20 reads some
        model = create_backbone(backbone, **options)
    block = model.blocks[0] if isinstance(model, VisionTransformer) else None
    if not isinstance(model, VisionTransformer) or type(block) is not Block or type(block.mlp) is not Mlp:
        return None
    attention = cast(Any, block.attn)
    mlp = cast(Any, block.mlp)
    patch_height, patch_width = model.patch_embed.patch_size
    patch = model.patch_embed.proj.in_channels * patch_height * patch_width
    return Transformer(
        width=model.embed_dim,
        depth=len(model.blocks),
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        heads=attention.num_heads,
        hidden=mlp.fc1.out_features,
        patch=patch,
        image=patch * model.patch_embed.num_patches,
        outputs=_CLASSES,
        has_layer_scale=not isinstance(block.ls1, nn.Identity),
    )

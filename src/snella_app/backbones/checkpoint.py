"""Read local weight files, and load them strictly into timm models."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from snella_app.text import first_line, listed

_logger = logging.getLogger(__name__)
_Shapes = dict[str, tuple[int, ...]]
# representation layer of early releases, which timm's ViT lacks
_REPRESENTATION = ("pre_logits/kernel", "pre_logits/bias")


def read_google_npz(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read a ViT in the layout of google-research/vision_transformer.

    timm's `VisionTransformer.load_pretrained` loads the arrays into a model of matching dimensions, whose state dict is
    returned.

    Args:
        path: `.npz` file.

    Returns:
        State dict with timm's key names, and the number of attention heads.

    Raises:
        ValueError: If the file is damaged, or an array is missing, is unexpected, or has an inconsistent shape.
        NotImplementedError: If the file is a ResNet-ViT hybrid or a big_vision checkpoint.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            shapes = {key: arrays[key].shape for key in arrays.files}
    except Exception as error:  # damaged files raise errors from zipfile, zlib, and the parser
        raise ValueError(f"weights '{path}' are not a readable .npz file: {first_line(error)}") from error
    if "opt/target/embedding/kernel" in shapes:
        prefix = "opt/target/"
        shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if "conv_root/kernel" in shapes:
        raise NotImplementedError(f"weights '{path}': .npz support is limited to plain ViTs, got a ResNet-ViT hybrid")
    if any(key.startswith("params/") or key == "pos_embedding" for key in shapes):
        raise NotImplementedError(
            f"weights '{path}': .npz support is limited to google-research/vision_transformer, got a big_vision "
            "checkpoint"
        )
    sizes = _google_sizes(shapes, path)
    _check_google_shapes(shapes, sizes, path)
    model = VisionTransformer(weight_init="skip", **sizes)
    model.load_pretrained(str(path))
    return {key: value.detach() for key, value in model.state_dict().items()}, sizes["num_heads"]


def _google_sizes(shapes: _Shapes, path: Path) -> dict[str, Any]:
    """Return the `VisionTransformer` arguments that match the arrays."""
    block = "Transformer/encoderblock_0/"
    required = (
        "embedding/kernel",
        "Transformer/posembed_input/pos_embedding",
        f"{block}MultiHeadDotProductAttention_1/query/kernel",
        f"{block}MlpBlock_3/Dense_0/kernel",
    )
    missing = [key for key in required if key not in shapes]
    if missing:
        raise ValueError(f"weights '{path}' are not a ViT in Google's layout: {', '.join(missing)} missing")
    patch, positions, query, hidden = (shapes[key] for key in required)
    grid = math.isqrt(positions[1] - 1) if len(positions) == 3 else 0
    has_dimensions = len(patch) == 4 and len(query) == 3 and len(hidden) == 2
    is_square = grid > 0 and grid * grid + 1 == positions[1]
    if not has_dimensions or not is_square:
        actual = ", ".join(f"{key} {list(shapes[key])}" for key in required)
        raise ValueError(f"weights '{path}' are not a ViT in Google's layout with a class token: {actual}")
    return {
        "img_size": grid * patch[0],
        "patch_size": patch[0],
        "embed_dim": patch[3],
        "depth": sum(key.startswith("Transformer/encoderblock_") and key.endswith("query/kernel") for key in shapes),
        "num_heads": query[1],
        "mlp_ratio": hidden[1] / hidden[0],
        "num_classes": shapes.get("head/bias", (0,))[0],
    }


def _check_google_shapes(shapes: _Shapes, sizes: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless all arrays are present and consistent.

    timm would silently broadcast an array of the wrong shape.
    """
    width = sizes["embed_dim"]
    heads = sizes["num_heads"]
    patch = sizes["patch_size"]
    classes = sizes["num_classes"]
    per_head = width // heads
    hidden = round(sizes["mlp_ratio"] * width)
    attention = "MultiHeadDotProductAttention_1"
    block: _Shapes = {
        **{f"{attention}/{part}/kernel": (width, heads, per_head) for part in ("query", "key", "value")},
        **{f"{attention}/{part}/bias": (heads, per_head) for part in ("query", "key", "value")},
        f"{attention}/out/kernel": (heads, per_head, width),
        f"{attention}/out/bias": (width,),
        **{f"{norm}/{leaf}": (width,) for norm in ("LayerNorm_0", "LayerNorm_2") for leaf in ("scale", "bias")},
        "MlpBlock_3/Dense_0/kernel": (width, hidden),
        "MlpBlock_3/Dense_0/bias": (hidden,),
        "MlpBlock_3/Dense_1/kernel": (hidden, width),
        "MlpBlock_3/Dense_1/bias": (width,),
    }
    expected: _Shapes = {
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, (sizes["img_size"] // patch) ** 2 + 1, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        **({"head/kernel": (width, classes), "head/bias": (classes,)} if classes else {}),
    }
    for index in range(sizes["depth"]):
        expected |= {f"Transformer/encoderblock_{index}/{key}": shape for key, shape in block.items()}
    errors: list[str] = []
    for key, shape in expected.items():
        if shapes.get(key) == shape:
            continue
        actual = str(list(shapes[key])) if key in shapes else "lacks it"
        errors.append(f"{key}: file {actual}, expected {list(shape)}")
    extra = [key for key in shapes if key not in expected]
    errors += [f"{key}: file {list(shapes[key])}, not part of a ViT" for key in extra if key not in _REPRESENTATION]
    if errors:
        raise ValueError(f"weights '{path}' are inconsistent: {listed(errors, separator='; ')}")
    if extra:
        _logger.info("dropped the representation layer of '%s': %s", path, ", ".join(extra))


_SINE_TOLERANCE = 2e-3  # half precision rounds sines by about 5e-4


@dataclass(frozen=True)
class Origin:
    """Publisher of weights, with the properties that a weight file does not contain.

    Attributes:
        label: Name for messages.
        mean: RGB mean of the training normalization.
        std: RGB standard deviation of the training normalization.
        num_heads: Number of attention heads by width; only widths with an unusual number have an entry.
    """

    label: str
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    num_heads: Mapping[int, int] = field(default_factory=dict)


GOOGLE = Origin("Google's ViT", IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
_MAE = Origin("MAE")
_MOCO = Origin("MoCo v3", num_heads={384: 12})
_SWIN = Origin("Microsoft's Swin")
_CONVNEXT = Origin("Facebook's ConvNeXt")


def _identify_origin(state: dict[str, Tensor]) -> Origin | None:
    """Identify the publisher of a state dict, or return None if it is unknown."""
    if "layers.0.downsample.reduction.weight" in state:
        return _SWIN
    if "downsample_layers.0.0.weight" in state:
        return _CONVNEXT
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[-1] % 4:
        return None
    grid = math.isqrt(max(positions.shape[1] - 1, 0))
    # MAE and MoCo v3 leave the position embedding of the class token at zero
    if grid < 2 or grid * grid + 1 != positions.shape[1] or positions[0, 0].any():
        return None
    # fixed sines of the patch's column, then row (MAE), or of its row, then column (MoCo v3)
    patches = positions[0, 1:].detach().float().cpu()
    row, column = _sines(grid, patches.shape[1])
    for origin, expected in ((_MAE, torch.cat([column, row], 1)), (_MOCO, torch.cat([row, column], 1))):
        if (patches - expected).abs().max() < _SINE_TOLERANCE:
            return origin
    return None


def _extract_encoder(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """Return the encoder of MAE or MoCo v3, and a description of the dropped parts.

    Other state dicts are returned unchanged, with None.
    """
    if "decoder_pos_embed" in state:
        encoder = {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}
        return encoder, f"MAE's decoder and mask token ({len(state) - len(encoder)} tensors)"
    if any(key.startswith("base_encoder.") for key in state):
        prefix = "base_encoder."
        encoder = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix) and not key.startswith(f"{prefix}head.")
        }
        dropped = len(state) - len(encoder)
        return encoder, f"MoCo v3's momentum encoder, projection head and predictor ({dropped} tensors)"
    return state, None


def _sines(grid: int, width: int) -> tuple[Tensor, Tensor]:
    """Return sinusoidal encodings of each patch's row and column, `[grid², width/2]` each, in raster order."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    encoded = torch.cat([angles.sin(), angles.cos()], 1).float()  # [grid, width/2]
    return encoded.repeat_interleave(grid, 0), encoded.repeat(grid, 1)


def state_dict_errors(
    state: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    optional_prefixes: tuple[str, ...] = (),
    optional_suffixes: tuple[str, ...] = (),
) -> list[str]:
    """Return one message per type of mismatch, with names and shapes.

    Names with one of the optional prefixes or suffixes may be missing.
    """
    missing = [
        f"{key} {list(value.shape)}"
        for key, value in reference.items()
        if key not in state and not key.startswith(optional_prefixes) and not key.endswith(optional_suffixes)
    ]
    unexpected = [f"{key} {list(value.shape)}" for key, value in state.items() if key not in reference]
    reshaped = [
        f"{key}: file {list(value.shape)}, model {list(reference[key].shape)}"
        for key, value in state.items()
        if key in reference and value.shape != reference[key].shape
    ]
    return format_mismatches(missing, unexpected, reshaped)


def format_mismatches(missing: list[str], unexpected: list[str], reshaped: list[str]) -> list[str]:
    """Return one message per type of mismatch that occurs, with its tensors."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("with a different shape", reshaped))
    return [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds if names]


def update_config(model: nn.Module, **entries: Any) -> None:
    """Update entries of a timm model's `pretrained_cfg`, the source of its data config."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    cfg.update(entries)
    for alias in ("pretrained_cfg", "default_cfg"):
        setattr(model, alias, cfg)


_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".pth.tar")
WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors", ".npz")
_NESTED_KEYS = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_TABLE = "relative_position_bias_table"
_PATCH = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Checkpoint:
    """Content of a weight file.

    Attributes:
        state: Tensors by name.
        source: Path of the file.
        num_heads: Number of attention heads, or None if the file and its publisher do not determine it.
        origin: Publisher, or None if it is unknown.
    """

    state: dict[str, Tensor]
    source: Path
    num_heads: int | None = None
    origin: Origin | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a weight file without executing code in it.

    Dictionaries nested under `state_dict`, `model`, or `model_state_dict` are unwrapped, and wrapper prefixes
    (`module.`, `_orig_mod.`, `model.`) are removed. Google's `.npz` is converted to timm's key names. Pre-training
    checkpoints (MAE, MoCo v3) are reduced to the encoder.

    Args:
        path: File with one of `WEIGHT_SUFFIXES`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file type is unknown, or the file is damaged, has no tensors, or is an inconsistent `.npz`.
        NotImplementedError: See `read_google_npz`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}': no such file")
    suffix = weight_suffix(path)
    if suffix == ".npz":
        state, heads = read_google_npz(path)
        return Checkpoint(state, path, heads, GOOGLE)
    if suffix == ".safetensors":
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights '{path}' are not a readable safetensors file: {error}") from error
    elif suffix in _TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise ValueError(f"weights '{path}' must end in one of {', '.join(WEIGHT_SUFFIXES)}, got {path.suffix!r}")
    state, dropped_parts = _extract_encoder(_unwrap(_open_nested(content, path)))
    if dropped_parts is not None:
        _logger.info("using only the encoder of '%s'; dropped %s", path, dropped_parts)
    origin = _identify_origin(state)
    num_heads: int | None = None
    if origin is not None and origin.num_heads:
        num_heads = origin.num_heads.get(state["pos_embed"].shape[-1])
    return Checkpoint(state, path, num_heads, origin)


def weight_suffix(path: Path) -> str:
    """Return the suffix that determines the file type, including `.pth.tar`."""
    return next((suffix for suffix in WEIGHT_SUFFIXES if path.name.endswith(suffix)), path.suffix)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, name: str) -> None:
    """Load all tensors of a checkpoint into a timm model, except a head with a different number of classes.

    timm's checkpoint filter converts names and resamples position embeddings. If the publisher is known, its mean and
    standard deviation replace those in the model's data config.

    Args:
        model: timm model from `create_model`; changed in place.
        checkpoint: Result of `read_checkpoint`.
        name: Name of the backbone, for messages.

    Raises:
        ValueError: If tensors are missing, unexpected, or of a different shape; if the number of attention heads
            differs; or if timm cannot convert the tensors.
    """
    reference = model.state_dict()
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    misfit = f"weights '{checkpoint.source}' do not fit backbone {name!r}"
    if mismatches := _resized_tensors(checkpoint, reference):
        raise ValueError(f"{misfit}: {'; '.join(mismatches)}")
    blocks = getattr(model, "blocks", None)
    first_attention = None if blocks is None else getattr(blocks[0], "attn", None)
    model_heads = getattr(first_attention, "num_heads", None)
    if None not in (checkpoint.num_heads, model_heads) and checkpoint.num_heads != model_heads:
        raise ValueError(
            f"weights '{checkpoint.source}' have {checkpoint.num_heads} attention heads, but "
            f"backbone {name!r} has {model_heads}"
        )
    state = _filtered(model, checkpoint, misfit)
    classifier = cfg.get("classifier") or ()
    head_names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for head_name in head_names:
        weight, expected = state.get(f"{head_name}.weight"), reference.get(f"{head_name}.weight")
        if weight is not None and (expected is None or weight.shape[0] != expected.shape[0]):
            _logger.info("dropped the head of %d classes in '%s'", len(weight), checkpoint.source)
            state = {key: value for key, value in state.items() if not key.startswith(f"{head_name}.")}
    mismatches = state_dict_errors(
        state,
        reference,
        optional_prefixes=tuple(f"{head_name}." for head_name in head_names),
        optional_suffixes=("num_batches_tracked",),
    )
    if mismatches:
        raise ValueError(f"{misfit}: {'; '.join(mismatches)}")
    model.load_state_dict(state, strict=False)
    if (origin := checkpoint.origin) is not None:
        if (tuple(cfg["mean"]), tuple(cfg["std"])) != (origin.mean, origin.std):
            _logger.info(
                "'%s' contains %s weights: normalizing images with mean %s and std %s",
                *(checkpoint.source, origin.label, origin.mean, origin.std),
            )
        update_config(model, mean=origin.mean, std=origin.std)


def _read_torch(path: Path) -> Any:
    """Unpickle tensors, plain values, and `argparse.Namespace` (which training scripts store), but no other types."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files also raise IndexError, AssertionError, and others
        raise ValueError(
            f"weights '{path}' cannot be read as tensors (files that contain code are rejected): {first_line(error)}"
        ) from error


def _open_nested(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the innermost dictionary of a file's content; raise ValueError if there are none."""
    while isinstance(content, dict):
        key = next((key for key in _NESTED_KEYS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
    tensors: dict[str, Tensor] = {}
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        actual = type(content).__name__
        if isinstance(content, dict):
            keys = listed(map(str, content)) or "no entries"
            actual = f"a dictionary with {keys}"
        raise ValueError(f"weights '{path}' must contain a dictionary of tensors, got {actual}")
    return tensors


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the name prefixes of DDP, `torch.compile`, and Lightning."""
    prefix = _wrapper_prefix(state)
    while prefix is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        prefix = _wrapper_prefix(state)
    return state


def _wrapper_prefix(state: dict[str, Tensor]) -> str | None:
    """Return the first wrapper prefix that all names share, if any."""
    for prefix in _WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            return prefix
    return None


def _first_table_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the first row of each relative position table."""
    return {key: value[:1] for key, value in state.items() if key.endswith(_TABLE)}


def _resized_tensors(checkpoint: Checkpoint, reference: dict[str, Tensor]) -> list[str]:
    """Return mismatches that timm's checkpoint filter hides, because it resizes patch embeddings and Swin's tables."""
    patch = checkpoint.state.get(_PATCH)
    other = reference.get(_PATCH)
    if patch is not None and other is not None and patch.ndim == other.ndim == 4 and patch.shape != other.shape:
        return state_dict_errors({_PATCH: patch}, {_PATCH: other})
    # compare one row: the number of rows may differ, but not the number of heads
    file_rows = _first_table_rows(checkpoint.state)
    model_rows = _first_table_rows(reference)
    return state_dict_errors(file_rows, model_rows, optional_prefixes=tuple(model_rows)) if model_rows else []


def _filtered(model: nn.Module, checkpoint: Checkpoint, misfit: str) -> dict[str, Tensor]:
    """Return the tensors, converted by the checkpoint filter of the timm model's family if there is one.

    Raises ValueError if the filter fails, with a message that starts with `misfit`.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(checkpoint.state)
    try:
        with warnings.catch_warnings():
            # torch warns while timm resamples Swin's tables
            warnings.filterwarnings("ignore", message="torch.searchsorted|Using a non-tuple sequence")
            return convert(dict(checkpoint.state), model)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{misfit}: timm cannot convert them ({error}); "
            f"the file contains {listed(f'{k} {list(v.shape)}' for k, v in checkpoint.state.items())}"
        ) from error

"""Segmentation models from SAM (Segment Anything Model).

The weights come from the authors' checkpoint, or from a file or folder in transformers' format.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from snella_app.backbones.checkpoint import format_mismatches, read_checkpoint, state_dict_errors
from snella_app.backbones.create import SAM_PREFIX
from snella_app.files import expand_user
from snella_app.text import first_line, listed

_DECODER_HEADS = 8  # not visible in the shapes; identical in every published SAM
_VISION = "vision_encoder."
_PROMPT = "prompt_encoder."
_DECODER = "mask_decoder."


def infer_sam_config(state: Mapping[str, Tensor], *, source: str) -> SamConfig:
    """Infer the configuration of a SAM of any size.

    The width of the image encoder's relative position tables determines the number of heads. Their length distinguishes
    blocks with global attention from those with window attention. The mask decoder is assumed to have eight heads.

    Args:
        state: State dict with the key names of transformers' `SamModel`.
        source: Path of the file, for error messages.

    Raises:
        ValueError: If required tensors are missing or shapes are inconsistent.
    """

    def shape(name: str, ndim: int | None = None) -> list[int]:
        """Return the shape of a tensor; raise ValueError if it is missing or does not have `ndim` dimensions."""
        if name not in state:
            raise ValueError(f"'{source}' is not a complete SAM: {name} missing")
        sizes = list(state[name].shape)
        if ndim not in (None, len(sizes)):
            raise ValueError(f"'{source}' is not a SAM: {name} must have {ndim} dimensions, got {sizes}")
        return sizes

    _, grid, _, width = shape(_VISION + "pos_embed", 4)
    patch = shape(_VISION + "patch_embed.projection.weight")[-1]
    head_width = shape(_VISION + "layers.0.attn.rel_pos_h", 2)[1]
    hidden = shape(_DECODER + "iou_token.weight", 2)[1]
    if width % head_width or hidden % _DECODER_HEADS:
        raise ValueError(
            f"'{source}' is not a SAM: width {width} must be a multiple of the head dimension {head_width}, and the "
            f"mask decoder's width {hidden} must be a multiple of its number of heads, {_DECODER_HEADS}"
        )
    depth = _count(state, _VISION + "layers.")
    lengths = [shape(f"{_VISION}layers.{k}.attn.rel_pos_h")[0] for k in range(depth)]
    global_length = 2 * grid - 1  # number of offsets between positions along one axis
    windows = {(length + 1) // 2 for length in lengths if length != global_length}
    if len(windows) > 1:
        raise ValueError(f"'{source}' is not a SAM: blocks must share one window size, got {sorted(windows)} patches")
    global_blocks = [k for k, length in enumerate(lengths) if length == global_length]
    vision = SamVisionConfig(
        hidden_size=width,
        output_channels=shape(_VISION + "neck.conv1.weight")[0],
        num_hidden_layers=depth,
        num_attention_heads=width // head_width,
        image_size=grid * patch,
        patch_size=patch,
        qkv_bias=f"{_VISION}layers.0.attn.qkv.bias" in state,
        window_size=windows.pop() if windows else grid,
        global_attn_indexes=global_blocks,
        num_pos_feats=hidden // 2,
        mlp_dim=shape(_VISION + "layers.0.mlp.lin1.weight")[0],
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=hidden,
        image_size=grid * patch,
        patch_size=patch,
        mask_input_channels=shape(_PROMPT + "mask_embed.conv2.weight")[0],
        num_point_embeddings=_count(state, _PROMPT + "point_embed."),
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=hidden,
        mlp_dim=shape(_DECODER + "transformer.layers.0.mlp.lin1.weight")[0],
        num_hidden_layers=_count(state, _DECODER + "transformer.layers."),
        num_attention_heads=_DECODER_HEADS,
        attention_downsample_rate=hidden
        // shape(_DECODER + "transformer.layers.0.cross_attn_token_to_image.q_proj.weight")[0],
        num_multimask_outputs=shape(_DECODER + "mask_tokens.weight")[0] - 1,  # the other token is for a single mask
        iou_head_depth=_count(state, _DECODER + "iou_prediction_head.layers.") + 2,  # proj_in and proj_out
        iou_head_hidden_dim=shape(_DECODER + "iou_prediction_head.proj_in.weight")[0],
    )
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered modules under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


_logger = logging.getLogger(__name__)
_IMAGE_POSITIONS = "shared_image_embedding.positional_embedding"
_PROMPT_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
_PIXEL_BUFFERS = {"pixel_mean", "pixel_std"}  # preprocessing constants in some copies of the file

# the authors' names → transformers' names, applied in order
_RENAMED: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"^(vision_encoder\.)blocks\.", r"\1layers."),
    (r"^(vision_encoder\.patch_embed)\.proj\.", r"\1.projection."),
    (r"^(vision_encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(vision_encoder\.neck)\.([02])\.", lambda m: f"{m[1]}.conv{int(m[2]) // 2 + 1}."),
    (r"^(vision_encoder\.neck)\.([13])\.", lambda m: f"{m[1]}.layer_norm{int(m[2]) // 2 + 1}."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _PROMPT_POSITIONS),
    (r"^(prompt_encoder)\.point_embeddings\.", r"\1.point_embed."),
    (r"^(prompt_encoder)\.mask_downscaling\.([036])\.", lambda m: f"{m[1]}.mask_embed.conv{int(m[2]) // 3 + 1}."),
    (r"^(prompt_encoder)\.mask_downscaling\.([14])\.", lambda m: f"{m[1]}.mask_embed.layer_norm{int(m[2]) // 3 + 1}."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(mask_decoder\.transformer)\.norm_final_attn\.", r"\1.layer_norm_final_attn."),
    (r"^(mask_decoder)\.output_upscaling\.0\.", r"\1.upscale_conv1."),
    (r"^(mask_decoder)\.output_upscaling\.1\.", r"\1.upscale_layer_norm."),
    (r"^(mask_decoder)\.output_upscaling\.3\.", r"\1.upscale_conv2."),
]
_MLP = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.")


def load_sam(path: str | Path, *, image_size: int | None = None) -> SamModel:
    """Load a SAM of any size with all weights.

    For a different image size, absolute positions are resampled bicubically, and relative positions of the global
    blocks linearly, as in SAM's forward pass.

    Args:
        path: The authors' `.pth`, a weight file with transformers' key names, or a folder written by
            `SamModel.save_pretrained`; the format is detected automatically.
        image_size: Input resolution in pixels; None uses the resolution of the weights (1024).

    Returns:
        Model in evaluation mode.

    Raises:
        FileNotFoundError: If the file, the folder or its `config.json` does not exist.
        OSError: If the folder contains no weights.
        ValueError: If the weights are damaged or not those of a SAM; if tensors are missing, unexpected, or of the
            wrong shape; or if `image_size` is not a multiple of the patch size.
    """
    location = expand_user(path)
    if location.is_dir():
        config, state = _read_folder(location)
    else:
        state = _to_transformers_names(read_checkpoint(location).state, location)
        config = infer_sam_config(state, source=str(location))
    if image_size is not None:
        config, state = _resized(config, state, image_size)
    model = SamModel(config)
    if problems := state_dict_errors(state, model.state_dict()):
        raise ValueError(f"weights '{location}' do not fit SAM: {'; '.join(problems)}")
    model.load_state_dict(state)
    return model.eval()


def _to_transformers_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert a state dict of either layout to transformers' names."""
    names = set(state)
    if not any(name.startswith(("image_encoder.patch_embed.", "vision_encoder.patch_embed.")) for name in names):
        raise ValueError(
            f"weights '{path}' are not those of a SAM: expected image_encoder.patch_embed (authors' format) or "
            f"vision_encoder.patch_embed (transformers' format), got {listed(sorted(names))}"
        )
    if any(name.startswith("image_encoder.") for name in names):
        depths: dict[str, int] = {}
        for match in filter(None, map(_MLP.match, names)):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
        state = {_renamed(name, depths): value for name, value in state.items() if name not in _PIXEL_BUFFERS}
    # one matrix with two names; a file stores it under one or both
    for name, alias in ((_IMAGE_POSITIONS, _PROMPT_POSITIONS), (_PROMPT_POSITIONS, _IMAGE_POSITIONS)):
        if name in state:
            state.setdefault(alias, state[name])
    return state


def _renamed(name: str, depths: dict[str, int]) -> str:
    """Convert one of the authors' names to the corresponding transformers name.

    `depths` maps the name of each MLP to its number of layers.
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    match = _MLP.match(name)
    if match is None:
        return name
    layer = int(match[2])
    last = depths[match[1]] - 1
    part = f"layers.{layer - 1}"
    if layer == 0:
        part = "proj_in"
    elif layer == last:
        part = "proj_out"
    return f"{match[1]}.{part}.{name[match.end() :]}"


def _read_folder(folder: Path) -> tuple[SamConfig, dict[str, Tensor]]:
    """Return the configuration and the weights of a folder in transformers' format."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"SAM folder '{folder}' must contain config.json and model.safetensors; config.json is missing"
        )
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{file}' is not a readable configuration: {error}") from error
    if model_type != "sam":
        raise ValueError(f"'{file}' must have model_type 'sam', got {model_type!r}")
    try:
        loaded: Any = SamModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except OSError:
        raise
    except Exception as error:  # damaged files raise errors from safetensors, torch, or huggingface_hub
        raise ValueError(f"SAM folder '{folder}' cannot be read: {first_line(error)}") from error
    model = cast(SamModel, loaded[0])
    info = loaded[1]
    problems = format_mismatches(
        *(sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched"))
    )
    if problems:
        raise ValueError(f"weights in '{folder}' do not fit its config.json: {'; '.join(problems)}")
    return model.config, model.state_dict()


def _resized(config: SamConfig, state: dict[str, Tensor], image_size: int) -> tuple[SamConfig, dict[str, Tensor]]:
    """Return the configuration and weights for an image size, which must be a multiple of the patch size."""
    vision: Any = config.vision_config
    patch = vision.patch_size
    old_grid = vision.image_size // vision.patch_size
    if image_size < patch or image_size % patch:
        raise ValueError(f"img_size must be a multiple of SAM's patch size {patch}, got {image_size}")
    grid = image_size // patch
    if grid == old_grid:
        return config, state
    _logger.info("resampled SAM's positions from %dx%d to %dx%d patches", old_grid, old_grid, grid, grid)
    settings = config.to_dict()
    settings["vision_config"] |= {"image_size": image_size}
    settings["prompt_encoder_config"] |= {"image_size": image_size, "image_embedding_size": grid}
    state = dict(state)
    positions = state["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    resampled = F.interpolate(positions.float(), size=(grid, grid), mode="bicubic", antialias=True)
    state["vision_encoder.pos_embed"] = resampled.permute(0, 2, 3, 1).to(positions.dtype)
    for block in vision.global_attn_indexes:
        for axis in "hw":
            name = f"vision_encoder.layers.{block}.attn.rel_pos_{axis}"
            table = state[name].T[None]
            state[name] = F.interpolate(table.float(), size=2 * grid - 1, mode="linear")[0].T.to(table.dtype)
    return SamConfig.from_dict(settings), state


class SamMaskHead(nn.Module):
    """SAM's mask decoder without prompts; the dense prompt is the "no mask" embedding.

    As in SAM-Adapter, the decoder and the dense embedding are trained, and the first mask token predicts the mask.

    Args:
        sam: Model that provides the decoder, dense embedding, and position encoding.
    """

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        self.masks = sam.mask_decoder  # a name ending in "decoder" would make PEFT wrap it twice
        self.position_encoding = sam.shared_image_embedding
        self.no_mask = nn.Parameter(sam.prompt_encoder.no_mask_embed.weight.detach()[0].clone())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Compute foreground logits `[batch, 1, 4h, 4w]` from image embeddings `[batch, channels, h, w]`."""
        batch, _, height, width = embeddings.shape
        dense = self.no_mask[None, :, None, None].expand(batch, -1, height, width)
        y = (torch.arange(height, device=embeddings.device, dtype=embeddings.dtype) + 0.5) / height
        x = (torch.arange(width, device=embeddings.device, dtype=embeddings.dtype) + 0.5) / width
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h, w, 2], x first
        positions = self.position_encoding(centers).permute(2, 0, 1)[None]
        masks, _ = self.masks(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.expand(batch, -1, -1, -1),
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return masks[:, 0]


class SamSegmenter(nn.Module):
    """Binary segmenter: `[batch, 3, S, S]` → scores of background (always 0) and foreground, `[batch, 2, S, S]`.

    With a background score of 0, the softmax probability of the foreground equals the sigmoid of SAM's logit.

    Args:
        sam: Model whose encoder and decoder are reused.
        image_size: Input resolution in pixels.
    """

    def __init__(self, sam: SamModel, image_size: int) -> None:
        super().__init__()
        self.encoder = sam.vision_encoder
        self.decoder = SamMaskHead(sam)
        # as in the GPS (2312.10136) and SAM-Adapter papers: ImageNet statistics, resizing without cropping
        self.pretrained_cfg = {
            "architecture": None,
            "input_size": (3, image_size, image_size),
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        self.default_cfg = self.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Compute the class scores of every pixel."""
        logits = self.decoder(self.encoder(images).last_hidden_state)
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


def create_sam_segmenter(path: str, *, num_classes: int, img_size: int | None = None) -> nn.Module:
    """Build a segmentation model from SAM.

    Args:
        path: Weights in any format that `load_sam` accepts.
        num_classes: Must be 2: background and foreground.
        img_size: Input resolution in pixels; None uses the resolution of the weights (1024).

    Raises:
        NotImplementedError: If `num_classes` is not 2.
        FileNotFoundError: If the file, the folder or its `config.json` does not exist.
        OSError: If the folder contains no weights.
        ValueError: If the weights are not a complete SAM, or `img_size` is not a multiple of the patch size.
    """
    if num_classes != 2:
        raise NotImplementedError(
            f"num_classes must be 2 for backbone {SAM_PREFIX}{path}, got {num_classes}; use a timm ViT as the "
            "backbone for other numbers of classes"
        )
    sam = load_sam(Path(path), image_size=img_size)
    return SamSegmenter(sam, next(iter(sam.vision_encoder.patch_embed.image_size)))

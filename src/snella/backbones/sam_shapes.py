"""Which `SamConfig` a state dict belongs to, told from its shapes."""

from collections.abc import Mapping

from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

__all__ = ["infer_sam_config"]

_DECODER_HEADS = 8  # not visible in the shapes; every published SAM has this many
_VISION, _PROMPT, _DECODER = "vision_encoder.", "prompt_encoder.", "mask_decoder."
_NEEDED = (
    _VISION + "pos_embed",
    _VISION + "patch_embed.projection.weight",
    _VISION + "layers.0.attn.rel_pos_h",
    _VISION + "layers.0.mlp.lin1.weight",
    _VISION + "neck.conv1.weight",
    _PROMPT + "mask_embed.conv2.weight",
    _DECODER + "iou_token.weight",
    _DECODER + "mask_tokens.weight",
    _DECODER + "iou_prediction_head.proj_in.weight",
    _DECODER + "transformer.layers.0.mlp.lin1.weight",
    _DECODER + "transformer.layers.0.cross_attn_token_to_image.q_proj.weight",
)


def infer_sam_config(state: Mapping[str, Tensor], *, source: str) -> SamConfig:
    """Find the sizes of a SAM: ViT-B, L, H or any other.

    Width, depth, patch and image size come from the image encoder's shapes, its heads from the width of its relative
    positions, and its global blocks from their length; the mask decoder has eight heads, as every published one.

    Args:
        state: State dict in the names of transformers' `SamModel`.
        source: The file as the user typed it, for messages.

    Raises:
        ValueError: Tensors that tell the sizes are missing, or the sizes do not agree; the message says which.
    """
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise ValueError(f"'{source}' is no complete SAM: {', '.join(missing)} missing")
    shapes = {key: list(state[key].shape) for key in _NEEDED}
    _, grid, _, width = shapes[_VISION + "pos_embed"]
    patch = shapes[_VISION + "patch_embed.projection.weight"][-1]
    head_width = shapes[_VISION + "layers.0.attn.rel_pos_h"][1]
    hidden = shapes[_DECODER + "iou_token.weight"][1]
    if width % head_width or hidden % _DECODER_HEADS:
        raise ValueError(
            f"'{source}' is no SAM: width {width} must be a multiple of the heads' width {head_width}, and the mask "
            f"decoder's width {hidden} one of its {_DECODER_HEADS} heads"
        )
    depth = _count(state, _VISION + "layers.")
    lengths = [state[f"{_VISION}layers.{k}.attn.rel_pos_h"].shape[0] for k in range(depth)]
    windows = {(length + 1) // 2 for length in lengths if length != 2 * grid - 1}
    if len(windows) > 1:
        raise ValueError(f"'{source}' is no SAM: its blocks have windows of {sorted(windows)} patches, one is needed")
    vision = SamVisionConfig(
        hidden_size=width,
        output_channels=shapes[_VISION + "neck.conv1.weight"][0],
        num_hidden_layers=depth,
        num_attention_heads=width // head_width,
        image_size=grid * patch,
        patch_size=patch,
        qkv_bias=f"{_VISION}layers.0.attn.qkv.bias" in state,
        window_size=windows.pop() if windows else grid,
        global_attn_indexes=[k for k, length in enumerate(lengths) if length == 2 * grid - 1],
        num_pos_feats=hidden // 2,
        mlp_dim=shapes[_VISION + "layers.0.mlp.lin1.weight"][0],
    )
    prompt = SamPromptEncoderConfig(
        hidden_size=hidden,
        image_size=grid * patch,
        patch_size=patch,
        mask_input_channels=shapes[_PROMPT + "mask_embed.conv2.weight"][0],
        num_point_embeddings=_count(state, _PROMPT + "point_embed."),
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=hidden,
        mlp_dim=shapes[_DECODER + "transformer.layers.0.mlp.lin1.weight"][0],
        num_hidden_layers=_count(state, _DECODER + "transformer.layers."),
        num_attention_heads=_DECODER_HEADS,
        attention_downsample_rate=hidden
        // shapes[_DECODER + "transformer.layers.0.cross_attn_token_to_image.q_proj.weight"][0],
        num_multimask_outputs=shapes[_DECODER + "mask_tokens.weight"][0] - 1,
        iou_head_depth=_count(state, _DECODER + "iou_prediction_head.layers.") + 2,
        iou_head_hidden_dim=shapes[_DECODER + "iou_prediction_head.proj_in.weight"][0],
    )
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are behind `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})

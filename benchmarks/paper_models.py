"""Models in the paper's tables with SNELLA-8, counted for a training batch on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch
from counted_step import CountedStep, count_step
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SamConfig, SamModel, SamVisionConfig

from snella_app.backbones.sam import SamSegmenter
from snella_app.backbones.segmenter import DECODER
from snella_app.methods import build_method
from snella_lab.recipes.trainer import adapt_headless

METHOD = "snella-8"
_CLASSES = 100
_SIDE = 224
_SAM_SIDE = 1024
_SAM: dict[str, dict[str, Any]] = {
    "SAM ViT-B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "SAM ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "SAM ViT-H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
}
SAM_NAMES = tuple(_SAM)
_SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_LATENT_SIDE = 8  # image pixels per latent pixel along each side
_CLIP_TOKENS = 77  # besides the tokens of the third text encoder


@cache
def classifier(backbone: str, batch: int) -> CountedStep:
    """Count a timm model at 224×224, the image size of the paper's classification experiments."""

    def build() -> nn.Module:
        return build_method(METHOD, timm.create_model(backbone, num_classes=_CLASSES))

    return count_step(build, {"": _empty(batch, 3, _SIDE, _SIDE)})


@cache
def sam(name: str, batch: int) -> CountedStep:
    """Count SAM's image encoder and mask decoder at 1024×1024; each quarter of the blocks ends with a global block."""
    sizes = _SAM[name]
    quarter = sizes["num_hidden_layers"] // 4
    vision = SamVisionConfig(
        **sizes, mlp_dim=4 * sizes["hidden_size"], global_attn_indexes=[quarter * part - 1 for part in range(1, 5)]
    )

    def build() -> nn.Module:
        model = SamSegmenter(SamModel(SamConfig(vision_config=vision.to_dict())), _SAM_SIDE)
        return build_method(METHOD, model, head=DECODER)

    return count_step(build, {"": _empty(batch, 3, _SAM_SIDE, _SAM_SIDE)})


@cache
def sd3_medium(resolution: int, tokens: int, batch: int) -> CountedStep:
    """Count the transformer of Stable Diffusion 3 (medium) with checkpointed blocks."""
    side = resolution // _LATENT_SIDE
    inputs: dict[str, Any] = {
        "hidden_states": _empty(batch, 16, side, side),
        "encoder_hidden_states": _empty(batch, _CLIP_TOKENS + tokens, 4096),
        "pooled_projections": _empty(batch, 2048),
        "timestep": _empty(batch),
        "return_dict": False,
    }
    return count_step(lambda: adapt_headless(METHOD, SD3Transformer2DModel(**_SD3), {}), inputs, "transformer_blocks")


@cache
def llama_7b(tokens: int, batch: int) -> CountedStep:
    """Count LLaMA-2-7B (the default sizes in transformers) with checkpointed blocks."""
    numbers = torch.empty(batch, tokens, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {
        "input_ids": numbers,
        "labels": numbers,
        "attention_mask": _empty(
            batch, 1, tokens, tokens
        ),  # a full mask, because transformers reads the values of a token mask
        "use_cache": False,
    }
    return count_step(lambda: adapt_headless(METHOD, LlamaForCausalLM(LlamaConfig()), {}), inputs, "layers")


def _empty(*shape: int) -> Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(*shape, device="meta")

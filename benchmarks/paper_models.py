"""The models of the paper's tables, without weights, each with SNELLA-8 in it and a batch as in training."""

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
from snella_app.methods.registry import adapt_headless

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
_LATENT_SIDE = 8  # pixels of a latent's side
_CLIP_TOKENS = 77  # beside those of the third text encoder


@cache
def classifier(backbone: str, batch: int) -> CountedStep:
    """A timm model at 224×224, the size of all experiments."""

    def build() -> nn.Module:
        return build_method(METHOD, timm.create_model(backbone, num_classes=_CLASSES))

    return count_step(build, {"": _empty(batch, 3, _SIDE, _SIDE)})


@cache
def sam(name: str, batch: int) -> CountedStep:
    """SAM's image encoder and mask decoder at 1024×1024; every fourth part of the blocks ends with a global one."""
    sizes = _SAM[name]
    quarter = sizes["num_hidden_layers"] // 4
    vision = SamVisionConfig(
        **sizes,
        mlp_dim=4 * sizes["hidden_size"],
        global_attn_indexes=[quarter * part - 1 for part in range(1, 5)],
    )

    def build() -> nn.Module:
        model = SamSegmenter(SamModel(SamConfig(vision_config=vision.to_dict())), _SAM_SIDE)
        return build_method(METHOD, model, head=DECODER)

    return count_step(build, {"": _empty(batch, 3, _SAM_SIDE, _SAM_SIDE)})


@cache
def sd3_medium(resolution: int, tokens: int, batch: int) -> CountedStep:
    """The transformer of Stable Diffusion 3 (medium), blocks checkpointed."""
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
    """LLaMA-2-7B, whose sizes are the defaults of transformers, blocks checkpointed."""
    numbers = torch.empty(batch, tokens, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {
        "input_ids": numbers,
        "labels": numbers,
        "attention_mask": _empty(batch, 1, tokens, tokens),  # whole: a mask by token would have its values looked at
        "use_cache": False,
    }
    return count_step(lambda: adapt_headless(METHOD, LlamaForCausalLM(LlamaConfig()), {}), inputs, "layers")


def _empty(*shape: int) -> Tensor:
    """A tensor without values."""
    return torch.empty(*shape, device="meta")

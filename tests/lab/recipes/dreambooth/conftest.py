"""Tiny Stable Diffusion 3, CLIP and DINOv2 models with random weights and generated tokenizers."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from snella_lab.recipes.pretrained import suppress_progress_bars

LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
LENGTH = 24


def clip_tokenizer():
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(CLIP_TOKENS)}, merges=[], model_max_length=LENGTH)


def text_config(**changes):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    ids = dict(vocab_size=len(CLIP_TOKENS), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return CLIPTextConfig(**sizes, **ids, max_position_embeddings=LENGTH, **changes)


def make_pipeline():
    """Create a random pipeline: two joint attention blocks, 4 latent channels, three text encoders."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
    )
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -1.0) for letter in LETTERS)]
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_3=T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=LENGTH),
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    with suppress_progress_bars(diffusers):
        make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    config = CLIPConfig(
        text_config=text_config().to_dict(), vision_config=dict(**vision, patch_size=8), projection_dim=16
    )
    with suppress_progress_bars(diffusers):
        CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(2)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    with suppress_progress_bars(diffusers):
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    BitImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


def write_subject(folder, count=4, side=20, seed=0):
    """Write similar images: a bright square at varying positions on dark noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 60, (side, side + 4, 3), dtype=np.uint8)
        pixels[4 + number : 12 + number, 6:14] = (230, 120, 40)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return write_subject(tmp_path_factory.mktemp("photos") / "toy")

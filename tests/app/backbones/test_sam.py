import json
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from snella_app.backbones.sam import infer_sam_config, load_sam


def tiny_config(hidden_size: int = 24, heads: int = 3, depth: int = 3, image_size: int = 64, **vision) -> SamConfig:
    """Small SAM; encoder weights have a realistic scale, since transformers initializes them at 1e-10."""
    vision = {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": 40, "initializer_range": 0.02} | vision
    sizes = {"image_size": image_size, "patch_size": 8}
    return SamConfig(
        vision_config=sizes
        | {"hidden_size": hidden_size, "num_hidden_layers": depth, "num_attention_heads": heads}
        | {"output_channels": 32, "num_pos_feats": 16}
        | vision,
        prompt_encoder_config=sizes | {"hidden_size": 32, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "iou_head_hidden_dim": 20},
    )


@pytest.fixture(scope="module")
def sam() -> SamModel:
    torch.manual_seed(0)
    model = SamModel(tiny_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _leaf_names(target: str, source: str, *leaves: str) -> dict[str, str]:
    return {f"{source}.{leaf}": f"{target}.{leaf}" for leaf in leaves or ("weight", "bias")}


def original_names(depth: int) -> dict[str, str]:
    """Map tensor names of the authors' checkpoint to transformers' names."""
    names = {"image_encoder.pos_embed": "vision_encoder.pos_embed"}
    names |= _leaf_names("vision_encoder.patch_embed.projection", "image_encoder.patch_embed.proj")
    for k in range(depth):
        target, source = f"vision_encoder.layers.{k}", f"image_encoder.blocks.{k}"
        names |= _leaf_names(f"{target}.layer_norm1", f"{source}.norm1") | _leaf_names(
            f"{target}.layer_norm2", f"{source}.norm2"
        )
        names |= _leaf_names(f"{target}.attn", f"{source}.attn", "rel_pos_h", "rel_pos_w")
        for layer in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
            names |= _leaf_names(f"{target}.{layer}", f"{source}.{layer}")
    names |= _leaf_names("vision_encoder.neck.conv1", "image_encoder.neck.0", "weight")
    names |= _leaf_names("vision_encoder.neck.layer_norm1", "image_encoder.neck.1")
    names |= _leaf_names("vision_encoder.neck.conv2", "image_encoder.neck.2", "weight")
    names |= _leaf_names("vision_encoder.neck.layer_norm2", "image_encoder.neck.3")
    names["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = "shared_image_embedding.positional_embedding"
    for k in range(4):
        names |= _leaf_names(f"prompt_encoder.point_embed.{k}", f"prompt_encoder.point_embeddings.{k}", "weight")
    for layer in ("not_a_point_embed", "no_mask_embed"):
        names |= _leaf_names(f"prompt_encoder.{layer}", f"prompt_encoder.{layer}", "weight")
    downscaling = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
    for number, layer in downscaling.items():
        names |= _leaf_names(f"prompt_encoder.mask_embed.{layer}", f"prompt_encoder.mask_downscaling.{number}")
    attentions = [
        f"transformer.layers.{k}.{kind}"
        for k in range(2)
        for kind in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ]
    attentions.append("transformer.final_attn_token_to_image")
    for attention in attentions:
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= _leaf_names(f"mask_decoder.{attention}.{projection}", f"mask_decoder.{attention}.{projection}")
    for k in range(2):
        block = f"mask_decoder.transformer.layers.{k}"
        for number in (1, 2, 3, 4):
            names |= _leaf_names(f"{block}.layer_norm{number}", f"{block}.norm{number}")
        for layer in ("mlp.lin1", "mlp.lin2"):
            names |= _leaf_names(f"{block}.{layer}", f"{block}.{layer}")
    names |= _leaf_names("mask_decoder.transformer.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn")
    for token in ("iou_token", "mask_tokens"):
        names |= _leaf_names(f"mask_decoder.{token}", f"mask_decoder.{token}", "weight")
    for number, layer in {0: "upscale_conv1", 1: "upscale_layer_norm", 3: "upscale_conv2"}.items():
        names |= _leaf_names(f"mask_decoder.{layer}", f"mask_decoder.output_upscaling.{number}")
    perceptrons = [f"mask_decoder.output_hypernetworks_mlps.{k}" for k in range(4)]
    for mlp in (*perceptrons, "mask_decoder.iou_prediction_head"):
        for number, layer in enumerate(("proj_in", "layers.0", "proj_out")):
            names |= _leaf_names(f"{mlp}.{layer}", f"{mlp}.layers.{number}")
    return names


def original_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    names = original_names(model.config.vision_config.num_hidden_layers)
    return {source: state[target] for source, target in names.items()}


def outputs(model: SamModel, size: int = 64) -> list[Tensor]:
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[[[10.0, 20.0], [30.0, 4.0]]]])
    with torch.no_grad():
        result = model(pixel_values=pixels, input_points=points, input_labels=torch.tensor([[[1, 0]]]))
    return [model.vision_encoder(pixels)[0], result.pred_masks, result.iou_scores]


def same_outputs(model: SamModel, other: SamModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(other), strict=True))


@pytest.fixture
def original(sam: SamModel, tmp_path: Path) -> Path:
    path = tmp_path / "sam_vit_tiny.pth"
    torch.save(original_state(sam), path)
    return path


def test_the_original_names_cover_every_tensor_of_the_model(sam):
    covered = set(original_names(3).values()) | {"prompt_encoder.shared_embedding.positional_embedding"}
    assert covered == set(sam.state_dict())


def test_the_authors_checkpoint_gives_the_same_masks_and_features_bit_for_bit(sam, original):
    loaded = load_sam(original)
    assert not loaded.training
    assert same_outputs(loaded, sam)
    shared = loaded.shared_image_embedding.positional_embedding
    assert torch.equal(shared, loaded.prompt_encoder.shared_embedding.positional_embedding)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: state | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)},
    ],
    ids=["nested", "ddp", "pixel-constants"],
)
def test_wrapped_copies_of_the_checkpoint_are_recognized(wrap, sam, tmp_path):
    torch.save(wrap(original_state(sam)), tmp_path / "sam.pth")
    assert same_outputs(load_sam(tmp_path / "sam.pth"), sam)


def test_a_transformers_folder_and_its_weight_file_are_recognized(sam, tmp_path):
    sam.save_pretrained(tmp_path / "sam")
    assert same_outputs(load_sam(str(tmp_path / "sam")), sam)
    assert same_outputs(load_sam(tmp_path / "sam" / "model.safetensors"), sam)


@pytest.mark.parametrize(
    ("width", "heads", "depth", "global_blocks"),
    [(768, 12, 12, [2, 5, 8, 11]), (1024, 16, 24, [5, 11, 17, 23]), (1280, 16, 32, [7, 15, 23, 31])],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_the_published_sizes_are_inferred_from_their_shapes(width, heads, depth, global_blocks):
    vision = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": depth}
    config = SamConfig(vision_config=vision | {"global_attn_indexes": global_blocks})
    with torch.device("meta"):
        state = SamModel(config).state_dict()
    actual = infer_sam_config(state, source="sam.pth").to_dict()
    expected = config.to_dict()
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        differing = {key: (actual[part].get(key), value) for key, value in expected[part].items()}
        differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1] and key != "mlp_ratio"}
        assert not differing, part


def test_positions_are_resampled_for_another_image_size(sam, original, tmp_path):
    smaller = load_sam(original, image_size=32)
    assert smaller.config.vision_config.image_size == smaller.config.prompt_encoder_config.image_size == 32
    assert smaller.vision_encoder.pos_embed.shape == (1, 4, 4, 24)
    # the global block's table, resampled as in the model
    attention, resized = sam.vision_encoder.layers[1].attn, smaller.vision_encoder.layers[1].attn
    assert torch.allclose(
        resized.get_rel_pos(4, 4, resized.rel_pos_h), attention.get_rel_pos(4, 4, attention.rel_pos_h)
    )
    assert torch.equal(smaller.vision_encoder.layers[0].attn.rel_pos_h, sam.vision_encoder.layers[0].attn.rel_pos_h)
    features, masks, _ = outputs(smaller, 32)
    assert features.shape == (1, 32, 4, 4) and masks.shape[-2:] == (16, 16)
    # constant positions are unchanged
    state = original_state(sam) | {"image_encoder.pos_embed": torch.full((1, 8, 8, 24), 0.5)}
    torch.save(state, tmp_path / "constant.pth")
    assert torch.allclose(
        load_sam(tmp_path / "constant.pth", image_size=96).vision_encoder.pos_embed, torch.tensor(0.5)
    )


def test_a_folder_supports_another_image_size(sam, original, tmp_path):
    sam.save_pretrained(tmp_path / "sam")
    model, other = load_sam(tmp_path / "sam", image_size=32), load_sam(original, image_size=32)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, 32), outputs(other, 32), strict=True))


@pytest.mark.parametrize("size", [4, 60])
def test_an_image_size_that_is_not_a_multiple_of_the_patch_size_is_rejected(size, original):
    with pytest.raises(ValueError, match=f"img_size must be a multiple of SAM's patch size 8, got {size}"):
        load_sam(original, image_size=size)


def test_missing_extra_and_reshaped_tensors_are_reported_together(sam, tmp_path):
    state = original_state(sam)
    del state["image_encoder.blocks.2.norm1.weight"]
    state["image_encoder.prompt_generator.shared_mlp.weight"] = torch.zeros(2, 3)
    state["mask_decoder.transformer.norm_final_attn.bias"] = torch.zeros(31)
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError) as caught:
        load_sam(tmp_path / "sam.pth")
    message = str(caught.value)
    assert "1 missing (vision_encoder.layers.2.layer_norm1.weight [24])" in message
    assert "1 unexpected (vision_encoder.prompt_generator.shared_mlp.weight [2, 3])" in message
    assert "mask_decoder.transformer.layer_norm_final_attn.bias: file [31], model [32]" in message


def test_missing_required_tensors_are_reported(sam, tmp_path):
    state = original_state(sam)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"not a complete SAM: mask_decoder\.iou_token\.weight missing"):
        load_sam(tmp_path / "sam.pth")


def test_inconsistent_sizes_are_rejected(sam):
    state = sam.state_dict()
    head = {"vision_encoder.layers.0.attn.rel_pos_h": torch.zeros(5, 7)}
    with pytest.raises(ValueError, match="width 24 must be a multiple of the head dimension 7"):
        infer_sam_config(state | head, source="sam.pth")
    window = {"vision_encoder.layers.2.attn.rel_pos_h": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=r"one window size, got \[3, 5\] patches"):
        infer_sam_config(state | window, source="sam.pth")


def test_an_unknown_network_error_lists_its_tensors(tmp_path):
    torch.save({"blocks.0.weight": torch.zeros(2)}, tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"not those of a SAM: expected image_encoder\.patch_embed .* got blocks\.0\.weight"
    ):
        load_sam(tmp_path / "vit.pth")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth': no such file"):
        load_sam(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))}' must contain config\.json"):
        load_sam(tmp_path)


def test_a_folder_of_another_model_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text("{]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json' is not a readable configuration"):
        load_sam(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type 'sam', got 'vit'"):
        load_sam(tmp_path)


def test_a_folder_with_damaged_weights_is_rejected(sam, tmp_path):
    sam.save_pretrained(tmp_path / "sam")
    file = tmp_path / "sam/model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"SAM folder '.*sam' cannot be read: "):
        load_sam(tmp_path / "sam")


def test_a_folder_with_mismatched_weights_is_rejected(sam, tmp_path):
    sam.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    del state["mask_decoder.iou_token.weight"]
    state["vision_encoder.neck.conv1.weight"] = torch.zeros(8, 24, 1, 1)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with pytest.raises(
            ValueError, match=r"1 missing \(mask_decoder\.iou_token\.weight\); 1 with a different shape \(.*neck"
        ):
            load_sam(tmp_path)
    finally:
        transformers.logging.set_verbosity(level)

"""Detection and segmentation models of transformers, trained with the default targets."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer

DECODER = dict(d_model=16, decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=5)
FIRST_ATTENTION = {f"decoder.layers.0.self_attn.{kind}_proj" for kind in "qkvo"}
"""Self-attention of the first DETR decoder layer, whose queries are zero."""


def detr_config(**sizes) -> transformers.DetrConfig:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    return transformers.DetrConfig(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, num_labels=3, **DECODER, **sizes
    )


def detr() -> nn.Module:
    sizes = dict(encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2)
    return transformers.DetrForObjectDetection(detr_config(**sizes))


def maskformer() -> nn.Module:
    stages = [f"stage{k}" for k in range(1, 5)]
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=64, out_features=stages
    )
    sizes = dict(fpn_feature_size=32, mask_feature_size=32, num_labels=3)
    decoder = detr_config(encoder_layers=0)
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **sizes)
    return transformers.MaskFormerForInstanceSegmentation(config)


def sam2() -> nn.Module:
    stages = dict(
        blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1] * 4
    )
    windows = dict(
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    backbone = transformers.Sam2HieraDetConfig(hidden_size=8, image_size=[64, 64], **stages, **windows)
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    prompts = transformers.Sam2PromptEncoderConfig(hidden_size=16, image_size=64, mask_input_channels=4)
    masks = transformers.Sam2MaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
    )
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    return transformers.Sam2Model(config)


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(2, 3, 64, 64)
    if isinstance(model.get_base_model(), transformers.Sam2Model):
        points = dict(input_points=torch.rand(2, 1, 1, 2) * 64, input_labels=torch.ones(2, 1, 1, dtype=torch.int))
        return model(pixel_values=x, **points).pred_masks.square().sum()
    output = model(pixel_values=x)
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    return sum(output[name].square().sum() for name in names if name in output)


@pytest.mark.parametrize(
    ("make", "without_gradient"),
    [
        (detr, {f"model.{name}" for name in FIRST_ATTENTION}),
        (maskformer, {f"model.transformer_module.{name}" for name in FIRST_ATTENTION}),
        # the default output has no mask 0, and the loss ignores both scores
        (
            sam2,
            {
                f"mask_decoder.{part}.{layer}"
                for part in ("output_hypernetworks_mlps.0", "iou_prediction_head", "pred_obj_score_head")
                for layer in ("proj_in", "layers.0", "proj_out")
            },
        ),
    ],
)
def test_matrices_without_gradient_are_named_in_one_warning(make, without_gradient):
    torch.manual_seed(0)
    model = get_peft_model(make(), SnellaConfig(r=2)).train()
    optimizer = create_snella_optimizer(model, lr=1e-3)
    # the budgets of these matrices are zero before the fifth step
    allocator = BudgetAllocator(model, total_epochs=3, steps_per_epoch=2).attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    (message,) = [str(w.message) for w in caught if "got no gradient" in str(w.message)]
    count = (
        f"{len(without_gradient)} of {len(allocator.matrices)} adapted matrices got no gradient in the first 5 steps: "
    )
    assert message.startswith(count)
    named = message.removeprefix(count).partition(";")[0]
    assert {name.strip("' ") for name in named.partition(" and ")[0].split(",")} <= without_gradient
    assert without_gradient <= set(allocator.frozen)

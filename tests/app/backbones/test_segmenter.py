import pytest
import torch
from torch import nn
from transformers import SamModel

from snella_app.backbones.segmenter import SegmentationModel, create_segmenter
from snella_app.methods import build_method, load_trained, save_trained


def make(name: str = "test_vit", classes: int = 3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"pretrained": False, "img_size": 32} | options
    return create_segmenter(name, num_classes=classes, **options)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_vit4"])
def test_a_timm_model_scores_every_pixel(name):
    size = {} if name == "test_convnext" else {"img_size": 64}
    model = make(name, **size)
    scores = model(torch.randn(2, 3, 64, 64))
    assert scores.shape == (2, 3, 64, 64) and scores.isfinite().all()


def test_the_decoder_uses_four_layers_including_the_last():
    model = make()
    depth = len(model.encoder.blocks)
    assert model.layers[-1] == depth - 1 and len(model.layers) == min(4, depth)


def test_images_are_not_cropped():
    import timm

    config = timm.data.resolve_model_data_config(make())
    assert config["crop_mode"] == "squash" and config["crop_pct"] == 1.0


@pytest.mark.filterwarnings("ignore:.* no budget allocator is attached:UserWarning")
@pytest.mark.parametrize("method", ["linear", "bias", "full", "lora-2", "snella-2"])
def test_every_method_trains_the_decoder_and_reloads(method, tmp_path):
    model = build_method(method, make(), head="decoder")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    decoder = [name for name, p in model.named_parameters() if "decoder" in name and p.requires_grad]
    assert len(decoder) == len(list(make().decoder.parameters()))
    if method == "linear":
        assert all("decoder" in name for name, p in model.named_parameters() if p.requires_grad)
    save_trained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path, make())(images), model.eval()(images))


def test_a_model_without_feature_maps_is_rejected():
    with pytest.raises(NotImplementedError, match=r"requires feature maps .*got Linear"):
        SegmentationModel(nn.Linear(2, 2), 2)


def test_the_decoder_learns_from_channels_last_maps_of_a_frozen_backbone():
    model = make("test_convnext", img_size=None)
    model.encoder.requires_grad_(False)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.decoder.norms.parameters())


def test_the_segmenter_reproduces_sam_logits_without_prompts(sam_folder):
    sam = SamModel.from_pretrained(sam_folder).eval()
    model = make(f"sam:{sam_folder}", 2, img_size=None).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = sam(pixel_values=images, multimask_output=False).pred_masks[:, 0]
        assert torch.equal(model.decoder(model.encoder(images).last_hidden_state), expected)
        scores = model(images)
    assert scores.shape == (2, 2, 64, 64) and not scores[:, 0].any()


def test_sam_adapts_the_encoder_and_trains_decoder_and_dense_embedding(sam_folder, tmp_path):
    model = build_method("snella-2", make(f"sam:{sam_folder}", 2, img_size=None), head="decoder")
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert any("decoder.modules_to_save.default.no_mask" in name for name in moved)
    assert any("mask_decoder" in name or "modules_to_save.default.masks" in name for name in moved)
    adapted = {name.split(".encoder.")[1].rsplit(".snella_A", 1)[0] for name in moved if "snella_A" in name}
    assert {name.split(".", 2)[2] for name in adapted} == {"attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"}
    save_trained(model, tmp_path)
    again = load_trained(tmp_path, make(f"sam:{sam_folder}", 2, img_size=None))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def test_sam_supports_smaller_images(sam_folder):
    model = make(f"sam:{sam_folder}", 2, img_size=32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2, 32, 32)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_sam_predicts_one_mask_and_includes_its_weights(sam_folder):
    with pytest.raises(NotImplementedError, match=r"num_classes must be 2 .*got 3"):
        make(f"sam:{sam_folder}", 3)
    with pytest.raises(ValueError, match=r"weights must be omitted for backbone 'sam:.*got 'w.pth'"):
        make(f"sam:{sam_folder}", 2, weights="w.pth")

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from snella_app.backbones.create import create_backbone


@pytest.mark.parametrize("safe", ["safe", False])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_in_hub_format_gives_the_saved_model(safe, prefix, tiny_vit, images, tmp_path):
    model = tiny_vit()
    save_for_hf(model, tmp_path, safe_serialization=bool(safe))
    assert (tmp_path / "model.safetensors").exists() == bool(safe)
    loaded = create_backbone(f"{prefix}{tmp_path}", num_classes=4).eval()
    assert torch.equal(loaded(images), model(images))


def test_class_count_and_input_size_may_differ(tiny_vit, tmp_path):
    model = tiny_vit()
    save_for_hf(model, tmp_path)
    loaded = create_backbone(str(tmp_path), num_classes=9, img_size=64)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 9)
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 64, 64)


def test_a_convolutional_network_in_a_folder_accepts_any_image_size(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_for_hf(model, tmp_path)
    loaded = create_backbone(str(tmp_path), num_classes=4, img_size=72).eval()
    images = torch.randn(1, 3, 72, 72)
    assert torch.equal(loaded(images), model(images))
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 72, 72)


def test_pretrained_false_builds_the_architecture_with_random_weights(tiny_vit, tmp_path):
    model = tiny_vit()
    save_for_hf(model, tmp_path)
    loaded = create_backbone(str(tmp_path), num_classes=4, pretrained=False)
    assert not torch.equal(loaded.pos_embed, model.pos_embed)


def test_a_tensor_missing_from_the_weight_file_is_reported(tiny_vit, tmp_path):
    model = tiny_vit()
    save_for_hf(model, tmp_path, safe_serialization=False)
    state = model.state_dict()
    del state["cls_token"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"1 missing \(cls_token \[1, 1, 64\]\)"):
        create_backbone(str(tmp_path), num_classes=3)


def test_a_folder_without_config_is_reported(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must contain config\.json and model\.safetensors; config\.json is missing"
    ):
        create_backbone(str(tmp_path), num_classes=2)


def test_a_folder_without_weights_is_reported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    with pytest.raises(FileNotFoundError, match=r"must contain one of model.safetensors, pytorch_model.bin"):
        create_backbone(str(tmp_path), num_classes=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not readable JSON: Expecting property name"),
        ("[]", "must name a timm model under 'architecture', got none"),
        ('{"architectures": ["ViTModel"]}', r"got none, only the transformers model \['ViTModel'\]"),
        ('{"architecture": "test_vitt"}', r"got 'test_vitt'; nearest: test_vit"),
    ],
)
def test_a_configuration_of_another_library_is_rejected(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        create_backbone(str(tmp_path), num_classes=2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architecture": ["test_vit"]}, r"'architecture' in .* must be a timm model, got \['test_vit'\]"),
        ({"model_args": {"wings": 2}}, r"does not describe a timm model \(TypeError: .*wings"),
        ({"pretrained_cfg": 3}, r"does not describe a timm model"),
    ],
)
def test_an_invalid_configuration_is_reported(entries, message, tiny_vit, tmp_path):
    save_for_hf(tiny_vit(), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    with pytest.raises(ValueError, match=message):
        create_backbone(str(tmp_path), num_classes=3)

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from huggingface_hub import constants

from snella_lab.recipes.dreambooth import pipeline as pipeline_module
from snella_lab.recipes.dreambooth.pipeline import check_resolution, encode_images, load_pipeline


@pytest.fixture
def copy(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "sd3")


def test_all_missing_components_are_reported_together(copy):
    shutil.rmtree(copy / "vae")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "text_encoder" / "config.json").unlink()
    for file in (copy / "tokenizer_2").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_pipeline(str(copy))
    assert str(caught.value).startswith(f"pipeline folder '{copy}' is incomplete: ")
    for error in (
        "vae/ is missing",
        "transformer/ has no weights",
        "text_encoder/ has no config.json",
        "tokenizer_2/ is missing",
    ):
        assert error in str(caught.value)


def test_folder_of_another_pipeline_is_rejected(copy, tmp_path):
    index = copy / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "vae": [None, None]}))
    with pytest.raises(FileNotFoundError, match=r"incomplete: vae is missing from model_index.json"):
        load_pipeline(str(copy))
    index.write_text(json.dumps({**content, "_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="must contain a StableDiffusion3Pipeline, got FluxPipeline"):
        load_pipeline(str(copy))
    index.write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json' is damaged: .*; copy the folder again"):
        load_pipeline(str(copy))
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"sd3' has no model_index.json, so it is not in diffusers format"):
        load_pipeline(str(copy))


def test_third_text_encoder_is_optional(copy):
    index = copy / "model_index.json"
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | absent))
    assert load_pipeline(str(copy)).text_encoder_3 is None


def test_precision_applies_to_the_text_encoders_only(pipeline_folder):
    pipeline = load_pipeline(str(pipeline_folder), "bf16")
    parts = (pipeline.text_encoder, pipeline.text_encoder_3, pipeline.transformer, pipeline.vae)
    assert [part.dtype for part in parts] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_missing_folder_suggests_similar_names(copy):
    with pytest.raises(FileNotFoundError, match=r"folder or a hub name \(owner/repo\), got '.*sd'; nearest: 'sd3'"):
        load_pipeline(str(copy.parent / "sd"))
    with pytest.raises(FileNotFoundError, match=r"got './no/where/sd3'; there is no folder 'no/where'"):
        load_pipeline("./no/where/sd3")


def test_unreachable_hub_is_reported(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"'nobody/nothing' is not a local folder and not cached, .* \(HF_HUB_OFFLINE is set\)"
    ):
        load_pipeline("nobody/nothing")


def test_missing_pipeline_on_a_reachable_hub_is_not_reported_as_denied(monkeypatch):
    def fail(*args, **options):
        raise OSError("nobody/nothing is not a valid model identifier")

    monkeypatch.setattr(pipeline_module, "cache_only_if_unreachable", lambda: nullcontext(None))
    monkeypatch.setattr(pipeline_module.StableDiffusion3Pipeline, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub: .* model identifier; check the name"):
        load_pipeline("nobody/nothing")


def test_unsupported_resolution_suggests_a_supported_one(pipeline_folder):
    pipeline = load_pipeline(str(pipeline_folder))
    with pytest.raises(ValueError, match="must be a multiple of 4 up to 32 for this pipeline, got 18; use 16"):
        check_resolution(pipeline, 18)
    with pytest.raises(ValueError, match="got 64; use 32"):
        encode_images(pipeline, [], torch.device("cpu"), 64)


@pytest.mark.parametrize("value", [None, []])
def test_an_empty_component_is_missing(value, copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "vae": value}))
    with pytest.raises(FileNotFoundError, match=r"vae is missing from model_index\.json"):
        load_pipeline(str(copy))

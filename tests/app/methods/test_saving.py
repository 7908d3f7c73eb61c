import json

import pytest
import timm
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from snella_app.methods import (
    AdapterFileError,
    MethodSpec,
    build_method,
    load_trained,
    load_trained_into,
    save_trained,
    spec_of,
)


def backbone(name="test_vit", num_classes=3):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **({"img_size": 32} if "vit" in name else {}))


def trained(method, name="test_vit"):
    model = build_method(method, backbone(name)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("method", ["lora-2", "snella-2"])
def test_a_saved_adapter_is_an_ordinary_peft_adapter(method, tmp_path):
    model = trained(method)
    save_trained(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbone(), str(tmp_path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    (tmp_path / "method.json").unlink()
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path, backbone())(images), model(images))


def test_training_can_continue_after_loading(tmp_path):
    save_trained(trained("snella-2"), tmp_path)
    loaded = load_trained(tmp_path, backbone())
    assert {p.requires_grad for n, p in loaded.named_parameters() if "snella_" in n} == {True}
    save_trained(loaded, tmp_path / "again")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("method", ["linear", "snella-2"])
def test_every_flipped_bit_of_the_values_is_detected(method, tmp_path):
    model = trained(method)
    save_trained(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for position in range(start, len(content), (len(content) - start) // 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(AdapterFileError, match=rf"{path.name} is damaged: its values were altered .*; copy the ad"):
            load_trained_into(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_invalid_header_is_reported_as_damage(tmp_path):
    save_trained(trained("linear"), tmp_path)
    path = tmp_path / "trainable.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F33"', 1))
    with pytest.raises(AdapterFileError, match=r"trainable.safetensors is damaged: .*F33.*; copy the adapter again"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize(("method", "name"), [("linear", "method.json"), ("snella-2", "adapter_config.json")])
def test_changed_settings_are_detected(method, name, tmp_path):
    save_trained(trained(method), tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + " ")
    with pytest.raises(AdapterFileError, match=rf"{name} is damaged: it was altered after the adapter was saved"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "snella-2"])
def test_values_that_are_not_finite_are_rejected(method, value, tmp_path):
    model = trained(method)
    name = next(n for n, p in model.named_parameters() if p.requires_grad)
    model.get_parameter(name).data.view(-1)[:2] = value
    save_trained(model, tmp_path)
    with pytest.raises(AdapterFileError, match=r"is damaged: 2 of \d+ values in '.*' are not finite; copy"):
        load_trained(tmp_path, backbone())


def test_an_adapter_without_a_digest_is_loaded_with_a_note(tmp_path, caplog):
    save_trained(trained("lora-2"), tmp_path)
    load_trained(tmp_path, backbone())
    assert not caplog.text
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    load_trained(tmp_path, backbone())
    assert f"note: {path} has no SHA-256 digest" in caplog.text


def test_targets_are_written_in_the_same_order_by_every_process(tmp_path):
    save_trained(trained("lora-2"), tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 1 and names == sorted(names)


@pytest.mark.parametrize("method", ["linear", "lora-2", "snella-2"])
def test_a_truncated_file_is_reported_with_its_size(method, tmp_path):
    save_trained(trained(method), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    size = path.stat().st_size
    with pytest.raises(AdapterFileError, match=rf"{path.name} is damaged: .*file not fully covered \({size} bytes\)"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"header too small \(0 bytes\)"),
        (b"abc", r"header too small \(3 bytes\)"),
        (b"\x05" + bytes(7) + b"{nope", "invalid JSON in header"),
        (b"\xff" * 40, r"header too large \(40 bytes\)"),
    ],
)
def test_invalid_content_is_reported_as_damage(content, message, tmp_path):
    save_trained(trained("linear"), tmp_path)
    (tmp_path / "trainable.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match=f"is damaged: .*{message}"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize("method", ["linear", "lora-2", "snella-2"])
def test_an_adapter_for_another_number_of_classes_names_the_tensor_and_both_shapes(method, tmp_path):
    save_trained(trained(method), tmp_path)
    with pytest.raises(AdapterFileError, match=r"head.*weight' is \[3, 64\] in the file and \[5, 64\] in the model"):
        load_trained(tmp_path, backbone(num_classes=5))


@pytest.mark.parametrize("method", ["linear", "bias"])
def test_an_adapter_of_another_architecture_lists_missing_and_extra_tensors(method, tmp_path):
    model = trained(method)
    save_trained(model, tmp_path)
    path = tmp_path / "trainable.safetensors"
    tensors = load_file(path)
    tensors["neck.weight"] = tensors.pop("head.weight")
    save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=r"the file lacks 'head.weight'; the model lacks 'neck.weight'"):
        load_trained(tmp_path, backbone())


def test_a_rejected_file_leaves_the_model_unchanged(tmp_path):
    save_trained(trained("lora-2"), tmp_path)
    other = build_method("lora-4", backbone())
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(AdapterFileError, match=r"in the model, .* and \d+ more"):
        load_trained_into(other, tmp_path)
    assert all(torch.equal(before[n], p) for n, p in other.named_parameters())


def test_many_missing_tensors_are_counted(tmp_path):
    model = trained("bias")
    save_trained(model, tmp_path)
    path = tmp_path / "trainable.safetensors"
    save_file({"head.bias": load_file(path)["head.bias"]}, path)
    with pytest.raises(AdapterFileError, match=r"the file lacks 'blocks.0.*', '.*', '.*' and \d+ more"):
        load_trained(tmp_path, backbone())


def test_equal_tensors_are_saved_as_equal_files(tmp_path):
    model = trained("snella-2")
    for number in range(8):
        save_trained(model, tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}) == 1


def test_an_adapter_replaces_one_of_another_kind(tmp_path):
    for method in ("lora-2", "ssf", "lora-2"):
        model = build_method(method, backbone())
        save_trained(model, tmp_path)
        assert spec_of(load_trained(tmp_path, backbone())).name == method


def test_a_folder_without_an_adapter_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} contains no adapter"):
        load_trained(tmp_path, backbone())
    save_trained(trained("linear"), tmp_path)
    (tmp_path / "trainable.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*trainable\.safetensors"):
        load_trained(tmp_path, backbone())


def test_a_missing_settings_file_of_a_peft_adapter_is_reported(tmp_path):
    save_trained(trained("lora-2"), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*adapter_config\.json; copy the adapter again"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize(("method", "name"), [("lora-2", "adapter_config.json"), ("linear", "method.json")])
@pytest.mark.parametrize(("content", "reason"), [("{", "Expecting"), ("[1]", r"must contain a mapping, got \[1\]")])
def test_damaged_settings_are_reported_with_a_remedy(method, name, content, reason, tmp_path):
    save_trained(trained(method), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(AdapterFileError, match=rf"{name} is damaged: .*{reason}.*; copy the adapter again, or train"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize("change", [{"peft_type": None}, {"peft_type": "NOPE"}, {"r": "x"}])
def test_altered_settings_are_reported_before_the_adapter_is_built(change, tmp_path):
    save_trained(trained("lora-2"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is damaged: it was altered after the adapter"):
        load_trained(tmp_path, backbone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 5}, "'method' must be a str, got 5"),
        ({"options": None}, "'options' must be a dict, got None"),
        ({"head": ["head"]}, r"'head' must be a str, got \['head'\]"),
    ],
)
def test_method_json_with_values_of_another_type_is_reported_as_damage(change, message, tmp_path):
    save_trained(trained("lora-2"), tmp_path)
    path = tmp_path / "method.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFileError, match=rf"method\.json is damaged: {message}; copy the adapter again"):
        load_trained(tmp_path, backbone())


def test_an_adapter_of_another_method_can_be_saved_again(tmp_path):
    config = IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])
    get_peft_model(backbone(), config).save_pretrained(str(tmp_path / "a"))
    model = load_trained(tmp_path / "a", backbone())
    save_trained(model, tmp_path / "b")
    assert spec_of(load_trained(tmp_path / "b", backbone())) == spec_of(model) == MethodSpec("ia3")


def test_method_json_rebuilds_the_model(tmp_path):
    save_trained(trained("snella-2"), tmp_path)
    described = json.loads((tmp_path / "method.json").read_text())
    assert described == {"format": 1, "method": "snella-2", "options": {"r": 2}, "head": "head"}


def test_method_json_without_a_key_is_reported_as_damage(tmp_path):
    save_trained(trained("linear"), tmp_path)
    path = tmp_path / "method.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "head"}))
    with pytest.raises(AdapterFileError, match=r"method\.json is damaged: 'head' is missing; copy the adapter again"):
        load_trained(tmp_path, backbone())

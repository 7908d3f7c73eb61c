"""Changed and resealed run files: one error that names the run, without library errors."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from snella_app.files import sealed
from snella_app.runs.model import load_run


@pytest.fixture
def forged(finished, tmp_path):
    """Copy of the finished run with a changed `run.json`."""

    def make(change):
        run = shutil.copytree(finished.path, tmp_path / "forged")
        values = json.loads((run / "run.json").read_text())
        change(values)
        (run / "run.json").write_text(json.dumps(sealed(values)))
        return run

    return make


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("img_size", -1, "backbone: img_size must be from 1 to 16,384, got -1"),
        ("img_size", 10**9, "img_size must be from 1 to 16,384, got 1,000,000,000"),
        ("img_size", 7, "img_size must be a multiple of the patch size 16 of 'test_vit', got 7"),
        ("num_classes", 0, "num_classes must be from 1 to 1,000,000, got 0"),
        ("num_classes", 4, "run.json must name the classes of 4 outputs, got 3 names"),
        ("channels", 0, "channels must be from 1 to 4,096, got 0"),
        ("channels", 5, r"forged cannot be loaded: .* tensor a \(5\) must match the size of tensor b \(3\)"),
    ],
)
def test_an_invalid_backbone_is_a_one_line_error(entry, value, message, forged):
    run = forged(lambda values: values["backbone"].__setitem__(entry, value))
    with pytest.raises(ValueError, match=message):
        load_run(run)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("input_size", 7, "forged cannot be loaded: .* cannot unpack non-iterable int"),
        ("input_size", [3, -32, -32], "run.json: data_config: height and width must be > 0; copy it again"),
        ("mean", [0.5] * 5, r"forged cannot be loaded: .* tensor a \(3\) must match the size of tensor b \(5\)"),
        ("mean", ["a"] * 3, "run.json: data_config: too many dimensions 'str'"),
        ("std", [0.0] * 3, "run.json: data_config: std evaluated to zero"),
        ("std", [float("1e-300")] * 3, "run.json: data_config: (std evaluated to zero|it must produce finite images)"),
        ("crop_pct", "x", "forged cannot be loaded: .* unsupported operand"),
        ("interpolation", 7, "run.json: data_config: interpolation must be one of .*, got 7"),
    ],
)
def test_an_invalid_data_config_is_a_one_line_error(entry, value, message, forged):
    run = forged(lambda values: values["data_config"].__setitem__(entry, value))
    with pytest.raises(ValueError, match=message):
        load_run(run)


def test_an_invalid_read_side_is_a_one_line_error(forged):
    run = forged(lambda values: values["data"].__setitem__("read_side", 0))
    with pytest.raises(ValueError, match=r"run\.json: data: read_side must be at least 1, got 0"):
        load_run(run)


def test_missing_class_names_are_a_one_line_error(forged):
    run = forged(lambda values: values["classes"].pop())
    with pytest.raises(ValueError, match=r"must name the classes of 3 outputs, got 2 names; copy the run again"):
        load_run(run)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("peft_type", "NONE", "peft_type in .* must be a PEFT method, got 'NONE'$"),
        ("peft_type", None, "peft_type in .* must be a PEFT method, got None$"),
        ("trainable_token_indices", [99], "'embed_tokens'"),
        ("r", -1, "r must be at least 1, got r=-1"),
        ("target_modules", 7, r"target_modules must be of type set\[str\] \| list\[str\] \| str \| None, got 7"),
    ],
)
def test_invalid_adapter_settings_are_a_one_line_error(entry, value, message, forged):
    run = forged(lambda values: values.update(files={}))
    path = run / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, entry: value}))
    tensors = path.with_name("adapter_model.safetensors")
    save_file(load_file(tensors), tensors, {"format": "pt"})  # without digests, as written by PEFT
    with pytest.raises(ValueError, match=message):
        load_run(run)

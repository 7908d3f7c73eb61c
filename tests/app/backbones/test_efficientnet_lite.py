import re

import pytest
import timm
import torch

from snella_lab.bundled.weights import convert_efficientnet_lite


@pytest.fixture(scope="module")
def renamed() -> dict[str, torch.Tensor]:
    """Random model with EfficientNet-PyTorch's tensor names, which start with `_`."""
    torch.manual_seed(0)
    return {f"_{key}": value for key, value in timm.create_model("tf_efficientnet_lite0").state_dict().items()}


def test_tensors_are_renamed_by_position(renamed, tmp_path):
    torch.save(renamed, tmp_path / "w.pth")
    converted = convert_efficientnet_lite(tmp_path / "w.pth")
    assert list(converted) == [key[1:] for key in renamed]
    assert all(torch.equal(converted[key[1:]], value) for key, value in renamed.items())


def test_a_wrong_number_of_tensors_is_rejected(renamed, tmp_path):
    torch.save(dict(list(renamed.items())[:-1]), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth' must contain 296 tensors, got 295"):
        convert_efficientnet_lite(tmp_path / "w.pth")


def test_a_tensor_with_a_wrong_shape_or_role_is_rejected(renamed, tmp_path):
    torch.save({**renamed, "_bn1.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape("_bn1.bias [3] does not match bn1.bias [32]")):
        convert_efficientnet_lite(tmp_path / "w.pth")
    swapped = {key.replace("running_mean", "running_var2"): value for key, value in renamed.items()}
    torch.save(swapped, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape("_bn1.running_var2 [32] does not match bn1.running_mean [32]")):
        convert_efficientnet_lite(tmp_path / "w.pth")

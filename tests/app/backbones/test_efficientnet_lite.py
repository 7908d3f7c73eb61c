import timm
import torch

from snella_lab.bundled.weights import convert_efficientnet_lite


def test_tensors_are_renamed_by_position(tmp_path):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {f"_{key}": value for key, value in state.items()}  # as in EfficientNet-PyTorch
    torch.save(renamed, tmp_path / "w.pth")
    converted = convert_efficientnet_lite(tmp_path / "w.pth")
    assert list(converted) == [key[1:] for key in renamed]
    assert all(torch.equal(converted[key[1:]], value) for key, value in renamed.items())

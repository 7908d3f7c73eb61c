"""Trainable parameters of ViT-B/16, excluding the head's 76,900, compared with the papers."""

import pytest
import timm
import torch

from snella_app.methods import build_method

HEAD = 768 * 100 + 100
LORA_8 = 8 * 12 * (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768)
SNELLA_8 = LORA_8 + 8 * 12 * 2 * 768 + 72 * 4  # q, k and v have separate factors A; α, β and two α_p per matrix


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("linear", 0),
        ("bias", 102_912),  # 0.10 M in VPT and NOAH
        ("full", 85_798_656),  # 85.8 M
        ("partial-1", 7_087_872 + 1_536),  # one block and the norm; VPT: 3.00 times the model size for 24 tasks
        ("mlp-3", 2 * (768 * 768 + 768) + 2 * 1_536),  # VPT: 1.35 times the model size for 24 tasks
        ("vpt-shallow-50", 50 * 768),
        ("vpt-deep-50", 12 * 50 * 768),
        ("vqt-1", 12 * 768 + 12 * 768 * 100),  # queries, and the wider head
        ("adapter-8", 156_768),  # 0.16 M in NOAH
        ("adapter-64", 1_189_632),
        ("mosa-16", 12 * (2 * 16 * 768 + 16 + 768)),  # same as one adapter
        ("ssf", 205_824),  # 0.21 M, 0.28 M with a head of 100 classes in SSF
        ("lora-8", LORA_8),
        ("snella-8", SNELLA_8),
        ("klora-8", SNELLA_8),
        ("dora-8", LORA_8 + 12 * (2304 + 768 + 3072 + 768)),
        ("supertuning", 12 * (17_694 + 5_898 + 23_592 + 23_592)),  # 1% of each matrix
        ("vera-256", 12 * (4 * 256 + 2304 + 768 + 3072 + 768)),
        ("loha-8", 2 * LORA_8),
        ("lokr-8", 80_640),  # documented number: factor sizes nearest to the square roots
        ("randlora-32", 12 * 4 * 24 * (32 + 768)),  # 768 / 32 bases, scales of their rows and columns
        ("hra-8", 8 * 12 * (768 + 768 + 768 + 3072)),
        ("delora-8", LORA_8 + 48),
        ("ln_tuning", 25 * 2 * 768),
    ],
)
def test_the_parameter_count_of_vit_b_is_as_published(method, count):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = build_method(method, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained - HEAD == count


@pytest.mark.parametrize(
    ("method", "expected_count"),
    [
        ("adalora-8", lambda n, m: 12 * (n + m + 1)),
        ("shira-8", lambda n, m: 8 * (n + m)),
        ("fourierft-100", lambda n, m: 100),
        ("boft-4", lambda n, m: n * 4 + m),
    ],
)
def test_the_parameter_count_per_layer_is_as_published(method, expected_count, make_model):
    model = make_model()
    shapes = [(m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][:-1]
    model = build_method(method, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(expected_count(n, m) for n, m in shapes) + 64 * 3 + 3

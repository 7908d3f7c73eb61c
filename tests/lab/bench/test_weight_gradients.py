"""Errors of weight-gradient estimates on a small model."""

from pathlib import Path

import timm
import torch


def test_eight_bit_inputs_change_the_weight_gradient_slightly(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    from weight_gradients import gradients, product

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval().requires_grad_(False)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    exact, rounded = (gradients(model, images, labels, compress=compress) for compress in (False, True))
    assert exact.keys() == rounded.keys()
    errors = []
    for name, pair in exact.items():
        expected = product(*pair)
        errors.append(float((product(*rounded[name]) - expected).norm() / expected.norm()))
    assert 0 < max(errors) < 0.1

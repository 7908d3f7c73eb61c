"""Memory predictions for three methods, without a run."""

import pytest
import torch

from snella_app.training.memory import predict_for_methods


def test_three_methods_are_predicted_at_the_requested_size():
    rows = list(predict_for_methods("test_vit", 4, img_size=32, r=2))
    assert [method for method, _, _ in rows] == ["snella-2", "lora-2", "full"]
    assert {shape for _, shape, _ in rows} == {(3, 32, 32)}
    snella, lora, full = (memory for _, _, memory in rows)
    assert snella.gradients < full.gradients / 4 and snella.saved_bytes <= lora.saved_bytes <= full.saved_bytes
    assert full.total > max(snella.total, lora.total)


def test_half_precision_halves_weights_and_saved_activations():
    (_, _, full), *_ = predict_for_methods("test_vit", 8, img_size=32)
    (_, shape, half), *_ = predict_for_methods("test_vit", 8, img_size=32, dtype="bf16")
    # column statistics of an update stay in float32; with this few tokens they are a sixteenth of the total
    assert half.saved_bytes == pytest.approx(full.saved_bytes / 2, rel=0.08) and shape == (3, 32, 32)
    assert full.weights / 2 < half.weights < full.weights  # the factors stay in float32


def test_predictions_do_not_depend_on_the_random_state():
    torch.manual_seed(1)
    first = [memory for _, _, memory in predict_for_methods("test_convnext", 3)]
    torch.manual_seed(2)
    assert first == [memory for _, _, memory in predict_for_methods("test_convnext", 3)]


def test_arguments_are_checked_before_a_model_is_built():
    message = r"batch must be at least 1, got 0; img_size must be at least 1, got -3; r must be at least 1, got 0; "
    with pytest.raises(ValueError, match=message + r"dtype must be one of fp32, bf16, got 'fp16'"):
        predict_for_methods("no such model", 0, img_size=-3, r=0, dtype="fp16")

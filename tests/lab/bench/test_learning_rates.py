"""Data of the learning-rate benchmark."""

from pathlib import Path

import pytest

from snella_app.config.train import TrainConfig


def test_data_without_unused_images_is_rejected(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    from learning_rates import features_of

    config = TrainConfig.from_flat(data="digits", backbone="test_vit", pretrained=False, img_size=32, out="-")
    with pytest.raises(ValueError, match=r"data must contain images .*, got none for 'digits'; use fewer"):
        features_of(config, 2, 600, tmp_path)

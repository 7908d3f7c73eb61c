"""Short training run on digits."""

from snella_app.config.train import TrainConfig


def config(out, **options):
    """Return the configuration of one epoch on 60 images with a random backbone."""
    settings = {
        "data": "digits",
        "backbone": "test_vit",
        "pretrained": False,
        "img_size": 32,
        "out": str(out),
        "device": "cpu",
        "train_size": 60,
        "val_size": 20,
        "test_size": 20,
        "epochs": 1,
        "batch_size": 20,
        "precision": "fp32",
        "r": 2,
        "progress": False,
    }
    return TrainConfig.from_flat(**settings | options)

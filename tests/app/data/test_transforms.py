import pickle
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from snella_app.data.transforms import build_transform

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode"), [(0.9, "center"), (1.0, "center"), (1.0, "squash"), (0.8, "squash")]
)
def test_evaluation_matches_timm(interpolation, crop_pct, crop_mode, image):
    config = {**CONFIG, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    actual = build_transform(config)(image)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert actual.shape == (3, 32, 32) and actual.dtype == torch.float32
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (33, 500), (500, 31)])
def test_small_and_narrow_images_are_resized_to_the_input_size(size):
    transform = build_transform(CONFIG)
    assert transform(Image.new("RGB", size)).shape == (3, 32, 32)


def test_the_data_config_of_the_model_is_used(image):
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert build_transform(config, augment="crop")(image).shape == (3, 160, 160)


def test_values_are_scaled_and_normalized():
    white = build_transform(CONFIG)(Image.new("RGB", (40, 40), "white"))
    expected = [(1 - mean) / std for mean, std in zip(CONFIG["mean"], CONFIG["std"], strict=True)]
    torch.testing.assert_close(white.amax((1, 2)), torch.tensor(expected))


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment", "3augment"])
def test_stronger_augmentation_extends_crop_and_uses_the_torch_generator(augment, image):
    crop, strong = (build_transform(CONFIG, augment=name) for name in ("crop", augment))
    results = []
    for transform in (strong, strong, crop):
        torch.manual_seed(3)
        results.append(transform(image))
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])
    assert results[0].shape == (3, 32, 32)
    pickle.loads(pickle.dumps(strong))


def test_3augment_keeps_the_channel_of_gray_images(image):
    gray = {**CONFIG, "mean": CONFIG["mean"][:1], "std": CONFIG["std"][:1]}
    transform = build_transform(gray, augment="3augment")
    assert {transform(image.convert("L")).shape for _ in range(20)} == {(1, 32, 32)}


def test_erasing_only_zeroes_a_rectangle(image):
    plain = build_transform(CONFIG, augment="none")(image)
    torch.manual_seed(0)
    erased = build_transform(CONFIG, augment="none", random_erasing=1.0)(image)
    is_erased = (erased == 0).all(0)
    rows, columns = is_erased.any(1).nonzero(), is_erased.any(0).nonzero()
    assert is_erased.sum() == len(rows) * len(columns) > 16
    assert torch.equal(erased[:, ~is_erased], plain[:, ~is_erased])


def test_flip_gives_the_evaluation_image_or_its_mirror(image):
    plain = build_transform(CONFIG, augment="none")(image)
    flip = build_transform(CONFIG, augment="flip")
    torch.manual_seed(0)
    seen = {("same" if torch.equal(x, plain) else "mirror" if torch.equal(x.flip(-1), plain) else "other")
            for x in (flip(image) for _ in range(20))}  # fmt: skip
    assert seen == {"same", "mirror"}


def test_crop_covers_at_least_half_of_the_area():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    crop = build_transform({**CONFIG, "mean": (0,) * 3, "std": (1,) * 3}, augment="crop")
    torch.manual_seed(0)
    spans = [float(out.max() - out.min()) * 255 for out in (crop(Image.fromarray(ramp.copy())) for _ in range(50))]
    assert min(spans) > 100 and max(spans) < 201 and len({round(span) for span in spans}) > 10


def test_evaluation_is_not_augmented(image):
    transform = build_transform(CONFIG)
    before = torch.random.get_rng_state()
    assert all(torch.equal(transform(image), transform(image)) for _ in range(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_pickled_transform_gives_the_same_result(image):
    transform = build_transform(CONFIG, augment="crop")
    torch.manual_seed(1)
    expected = transform(image)
    torch.manual_seed(1)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), expected)


@pytest.mark.parametrize(
    ("changes", "augment", "error", "message"),
    [
        ({}, "mirror", ValueError, "imagenet, randaugment, trivialaugment, 3augment, got 'mirror'"),
        ({"interpolation": "random"}, "none", ValueError, "hamming, lanczos, got 'random'"),
        ({"crop_mode": "border"}, "none", ValueError, "crop_mode must be one of center, squash, got 'border'"),
        ({"input_size": (3, 32, 48)}, "none", NotImplementedError, "input_size must be square, got [32, 48]"),
    ],
)  # fmt: skip
def test_unknown_values_are_rejected_with_the_choices(changes, augment, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build_transform({**CONFIG, **changes}, augment=augment)


def test_missing_configuration_entries_are_reported():
    with pytest.raises(
        ValueError, match=r"data_config must contain mean, std; use timm.data.resolve_model_data_config"
    ):
        build_transform({"input_size": (3, 8, 8)}, augment="none")


def test_imagenet_augmentation_also_changes_colors():
    image = Image.new("RGB", (64, 64), (90, 120, 200))
    torch.manual_seed(0)
    plain, augmented = (build_transform(CONFIG, augment=name)(image) for name in ("crop", "imagenet"))
    assert augmented.shape == plain.shape and not torch.allclose(augmented, plain, atol=0.1)
    assert augmented.flatten(1).std(dim=1).max() < 1e-4, "a uniform image stays uniform"

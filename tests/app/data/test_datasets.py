import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from snella_app.data.datasets import ImageDataset, MaskDataset, joined
from snella_app.data.load import load_data
from snella_app.data.sources import ArrayImages, ArrayMasks
from snella_app.data.transforms import build_transform

CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
CROP = build_transform(CONFIG, augment="crop")


def noise(n: int = 12, transform=None, seed: int = 0) -> ImageDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 20, 24), dtype=np.uint8)
    names = [f"noise/{index}" for index in range(n)]
    data = ImageDataset(ArrayImages(pixels), range(n), [index % 3 for index in range(n)], names)
    data.seed = seed
    return data.with_transform(transform)


def epoch_of(data: ImageDataset, **loader) -> torch.Tensor:
    return torch.cat([images for images, _ in DataLoader(data, batch_size=4, **loader)])


def test_without_a_transform_an_item_is_an_rgb_image_and_a_label():
    image, label = noise()[5]
    assert (image.mode, image.size, label) == ("RGB", (24, 20), 2)


def test_length_labels_and_names_match():
    data = noise()
    assert len(data) == len(data.labels) == len(data.names) == 12
    assert data.names[3] == "noise/3" and data.labels[3] == 0


def test_an_item_depends_only_on_seed_epoch_and_index():
    data = noise(transform=CROP, seed=3)
    first = data[4][0]
    torch.manual_seed(99)
    data[7], data[0]
    assert torch.equal(data[4][0], first)
    assert torch.equal(noise(transform=CROP, seed=3)[4][0], first)
    assert not torch.equal(noise(transform=CROP, seed=4)[4][0], first)
    data.set_epoch(1)
    assert not torch.equal(data[4][0], first)
    data.set_epoch(0)
    assert torch.equal(data[4][0], first)


def test_two_items_are_augmented_differently():
    pixels = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8), (2, 20, 24))
    data = ImageDataset(ArrayImages(pixels), [0, 1], [0, 1], ["a", "b"]).with_transform(CROP)
    assert not torch.equal(data[0][0], data[1][0])


def test_the_torch_generator_is_unchanged():
    data = noise(transform=CROP)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    data[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_return_the_same_items_as_the_main_process(context):
    data = noise(transform=CROP, seed=1)
    data.set_epoch(2)
    expected = epoch_of(data)
    assert torch.equal(epoch_of(data, num_workers=2, multiprocessing_context=context), expected)


def test_persistent_workers_use_the_new_epoch():
    data = noise(transform=CROP)
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        from_worker = torch.cat([images for images, _ in loader])
        assert torch.equal(from_worker, epoch_of(data)), epoch


def test_a_copy_with_another_transform_keeps_images_seed_and_epoch():
    data = noise(seed=7)
    data.set_epoch(3)
    copy = data.with_transform(v2.PILToTensor())
    assert copy[1][0].shape == (3, 20, 24) and data.transform is None
    assert (copy.seed, copy.epoch, copy.names, copy.labels) == (7, 3, data.names, data.labels)
    assert copy.source is data.source
    copy.set_epoch(4)
    assert data.epoch == 3


def test_a_subset_has_the_requested_order():
    data = noise().subset([5, 0, -1])
    assert data.names == ["noise/5", "noise/0", "noise/11"] and data.labels == [2, 0, 2]


def test_changing_a_returned_image_does_not_change_the_data():
    data = noise()
    before = data[0][0].tobytes()
    data.image(0).paste("red", (0, 0, 20, 20))
    assert data.image(0).tobytes() == before
    assert data.image(-1).tobytes() == data.image(11).tobytes()


@pytest.mark.parametrize("index", [12, -13])
def test_an_index_beyond_the_end_is_rejected(index):
    for get in (noise().__getitem__, noise().image):
        with pytest.raises(IndexError):
            get(index)


def test_rows_labels_and_names_must_have_equal_lengths():
    with pytest.raises(ValueError, match="equal lengths, got 2, 1 and 3"):
        ImageDataset(ArrayImages(np.zeros((2, 4, 4), np.uint8)), [0, 1], [0], ["a", "b", "c"])


def test_a_pickled_dataset_has_the_same_items():
    data = noise(transform=CROP, seed=2)
    data.set_epoch(5)
    restored = pickle.loads(pickle.dumps(data))
    assert restored.epoch == 5
    assert torch.equal(restored[3][0], data[3][0])


def test_the_content_digest_depends_only_on_pixels_and_order():
    data = noise()
    digest = data.content_digest()
    assert noise(transform=CROP, seed=3).content_digest() == digest
    assert data.subset(range(11, -1, -1)).content_digest() != digest
    first, second = data.subset(range(5)), data.subset(range(5, 12))
    assert joined(first, second).content_digest() == digest
    data.source.pixels[7, 19, 23] ^= 1
    assert data.content_digest() != digest and first.content_digest() == noise().subset(range(5)).content_digest()


def test_the_content_digest_depends_on_masks():
    def segmented(corner):
        labels = np.zeros((3, 20, 24), np.uint8)
        labels[2, 0, 0] = corner
        return MaskDataset(noise().source, ArrayMasks(labels), range(3), ["a", "b", "c"])

    assert segmented(0).content_digest() == segmented(0).content_digest() != segmented(1).content_digest()


def test_full_shared_memory_is_a_one_line_error(monkeypatch):
    def fail(tensor):
        raise RuntimeError("unable to resize file </torch_1> to the right size: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(
        OSError, match=r"cannot allocate eight bytes in shared memory: .*No space left .*free space in /dev/shm"
    ):
        noise()


def test_encoding_needs_raw_labels():
    with pytest.raises(RuntimeError, match=r"got images with classes only; pass target='labels' or 'numbers' to load_"):
        load_data("digits").train.with_targets(str)[0]
    assert load_data("digits", target="numbers").train.with_targets(str)[0][1] in set(map(str, map(float, range(10))))

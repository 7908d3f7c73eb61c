"""Two parts of the data as one."""

from PIL import Image

from snella.data.dataset import ImageDataset
from snella.data.mask_dataset import MaskDataset
from snella.data.sources import ImageSource

__all__ = ["joined"]


class _JoinedSource:
    """Rows below a boundary from one source, the others from another."""

    def __init__(self, first: ImageSource, second: ImageSource, boundary: int) -> None:
        self.first, self.second, self.boundary = first, second, boundary

    def load(self, row: int) -> Image.Image:
        """The image of either source."""
        return self.first.load(row) if row < self.boundary else self.second.load(row - self.boundary)


def joined(first: ImageDataset, second: ImageDataset) -> ImageDataset:
    """The images of both, without transform, with the seed of the first.

    Args:
        first: Of the same kind as `second`: images, or images with masks.
        second: Follows.
    """
    boundary = 1 + max(first.rows, default=-1)
    rows = [*first.rows, *(boundary + row for row in second.rows)]
    names = [*first.names, *second.names]
    source = _JoinedSource(first.source, second.source, boundary)
    if isinstance(first, MaskDataset) and isinstance(second, MaskDataset):
        return MaskDataset(source, _JoinedSource(first.masks, second.masks, boundary), rows, names, seed=first.seed)
    return ImageDataset(source, rows, [*first.labels, *second.labels], names, seed=first.seed)

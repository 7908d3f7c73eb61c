"""Speed, memory, cache and behavior of snella and Hugging Face `datasets` on class folders.

    python benchmarks/data_reading.py FOLDER --out benchmarks/data_reading.jsonl
    python benchmarks/data_reading.py --behavior --out benchmarks/data_reading.jsonl
    python benchmarks/data_reading.py --table --out benchmarks/data_reading.jsonl

Readers:

    folder      `load_data("folder:PATH")`: checks each image, then decodes at the training resolution
    hf          `load_data("hf:PATH")`: `datasets` lists the files; snella checks and decodes them
    datasets    `load_dataset("imagefolder")`: decodes without checks; images are converted to RGB

The images below FOLDER are pooled by class, either unchanged (`png`) or enlarged to JPEGs of 1600 pixels (`jpeg`). Each
measurement is a process that imports, loads, and reads two epochs with the training transform on two threads, without
workers. `cold` starts with an empty `datasets` cache and no images in the page cache; `warm` is the next process.
Readers are interleaved over the rounds.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from documents import markdown_table
from PIL import Image

READERS = ("folder", "hf", "datasets")
CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
}
_BATCH = 32
_THREADS = 2
_SIDE = 1600
_READ_SIDE = 896
"""Minimum shorter side of images decoded for training at 224 pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--out")
    parser.add_argument("--kind", choices=("png", "jpeg"), default="png")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--behavior", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the table of the rows in --out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS, metavar=("READER", "FOLDER"))
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    from snella_lab.bench.rows import append_rows, read_rows
    from snella_lab.provenance import conditions

    if options.table:
        print(speed_table(read_rows(options.out)))
        return
    command = f"data_reading.py {'--behavior' if options.behavior else f'FOLDER --kind {options.kind}'}"
    for row in behaviors() if options.behavior else speeds(options):
        provenance = conditions("cpu", ("torch", "torchvision", "datasets", "pyarrow"))
        row = {"benchmark": "data_reading", **row, **provenance, "command": command}
        print(json.dumps(row))
        if options.out:
            append_rows(options.out, [row])


def speeds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each round, reader and cache state."""
    with tempfile.TemporaryDirectory() as temporary:
        photos = Path(temporary, "photos")
        files = write_images(options.folder, photos, options.kind, options.images)
        for number in range(options.rounds):
            for reader in READERS:
                cache = Path(temporary, f"cache-{reader}-{number}")
                for state in ("cold", "warm"):
                    if state == "cold":
                        drop_from_page_cache(files)
                    measured = run_measurement(reader, photos, cache)
                    measured["cache_mb"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e6
                    source = {"folder": options.folder.name, "kind": options.kind, "images": len(files)}
                    yield {"reader": reader, "state": state, **source, **measured}


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Format the medians over rounds as a table."""
    columns = {
        "load_s": "load, s",
        "load_and_first_epoch_s": "load and first epoch, s",
        "first_epoch_images_per_cpu_s": "first epoch",
        "later_epochs_images_per_cpu_s": "later epochs",
        "peak_mb": "peak memory, MB",
        "cache_mb": "cache on disk, MB",
    }
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "state" in row:
            groups.setdefault((f"{row['images']} {row['kind'].upper()}", row["state"], row["reader"]), []).append(row)
    lines = []
    for key, runs in groups.items():
        medians = [statistics.median(run[name] for run in runs) for name in columns]
        lines.append([*key, *(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in medians)])
    return markdown_table(["images", "caches", "reader", *columns.values()], lines, left=3)


def write_images(source: Path, folder: Path, kind: str, count: int) -> list[Path]:
    """Write up to `count` images as `class/image`, an equal share of each class, and return the files."""
    by_class: dict[str, list[Path]] = {}
    for file in sorted(source.rglob("*.png")):
        by_class.setdefault(file.parent.name, []).append(file)
    order = sorted((number, name, file) for name, images in by_class.items() for number, file in enumerate(images))
    files = []
    for number, name, file in order[:count]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        files.append(folder / name / f"{number:04}.{'jpg' if kind == 'jpeg' else 'png'}")
        if kind == "png":
            files[-1].write_bytes(file.read_bytes())
            continue
        enlarge(Image.open(file).convert("RGB")).save(files[-1], quality=90)
    return files


def enlarge(image: Image.Image) -> Image.Image:
    """Resize an image to a longer side of 1600 pixels."""
    scale = _SIDE / max(image.size)
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Remove files from the page cache."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_measurement(reader: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Measure a reader in a new process with its own `datasets` cache folder."""
    command = [sys.executable, __file__, "--measure", reader, str(folder)]
    environment = {**os.environ, "HF_HOME": str(cache), "OMP_NUM_THREADS": str(_THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{reader} failed: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(reader: str, folder: str) -> dict[str, Any]:
    """Import, load and read two epochs, and return times, images per second and peak memory."""
    start = time.perf_counter()
    from torch.utils.data import DataLoader

    from snella_app.data.transforms import build_transform
    from snella_app.training.memory import peak_rss_mib

    if reader != "folder":
        import datasets  # noqa: F401

    imported = time.perf_counter()
    transform = build_transform(CONFIG, augment="crop")
    dataset = hf_dataset(folder, transform) if reader == "datasets" else snella_dataset(f"{reader}:{folder}", transform)
    loaded = time.perf_counter()
    epochs = []
    for _ in range(2):
        begin, cpu = time.perf_counter(), time.process_time()
        for images, _labels in DataLoader(dataset, _BATCH):
            if images.shape[1:] != (3, 224, 224):
                raise RuntimeError(f"images must be 3×224×224, got {list(images.shape)}")
        epochs.append((len(dataset) / (time.perf_counter() - begin), len(dataset) / (time.process_time() - cpu)))
    end = time.perf_counter()
    measured = {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_epoch_images_per_s": epochs[0][0],
        "later_epochs_images_per_s": epochs[1][0],
        "first_epoch_images_per_cpu_s": epochs[0][1],
        "later_epochs_images_per_cpu_s": epochs[1][1],
        "load_and_first_epoch_s": loaded - imported + len(dataset) / epochs[0][0],
        "total_s": end - start,
        "peak_mb": peak_rss_mib() * 2**20 / 1e6,
    }
    return {name: round(value, 2) for name, value in measured.items()}


def snella_dataset(spec: str, transform: Callable[[Any], Any]) -> Any:
    """Return all images as snella reads them for training."""
    from snella_app.data.datasets import read_at_side
    from snella_app.data.load import load_data

    images = load_data(spec, divide=False).train
    return read_at_side([images.with_transform(transform)], _READ_SIDE)[0]


def hf_dataset(folder: str, transform: Callable[[Any], Any]) -> Any:
    """Return all images as `datasets` reads them."""
    import datasets

    datasets.disable_progress_bars()
    images = datasets.load_dataset("imagefolder", data_dir=folder, split="train")

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [transform(image.convert("RGB")) for image in batch["image"]], "label": batch["label"]}

    images.set_transform(convert)
    return _Pairs(images)


class _Pairs:
    """Items of a Hugging Face dataset as (image, label)."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.images[index]
        return item["image"], item["label"]


def behaviors() -> Iterator[dict[str, Any]]:
    """Yield a row for each case of `CASES`, with the outcome of each reader."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory() as temporary:
        for name, write in CASES.items():
            folder = Path(temporary, name.replace(" ", "-"))
            write(folder)
            table = next(folder.glob("labels.*"), None)
            outcomes = {"folder": lambda f=folder, t=table: describe_snella(f"csv:{t}" if t else f"folder:{f}", f)}
            outcomes["hf"] = lambda f=folder: describe_snella(f"hf:{f}", f)
            outcomes["datasets"] = lambda f=folder, t=table: describe_datasets(f, t)
            yield {"case": name, **{reader: outcome(run) for reader, run in outcomes.items()}}


def outcome(run: Callable[[], str]) -> str:
    """Return the outcome of a case or its error."""
    try:
        text = run()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp[^/ ]*/", "", text)


def describe_snella(spec: str, folder: Path) -> str:
    """Describe the result of `load_data`; after an error, repeat it with `skip_corrupt`."""
    from snella_app.data.load import load_data
    from snella_app.data.options import DataConfig

    try:
        splits = load_data(spec, divide=False)
    except ValueError as error:
        message = str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER")
        splits = load_data(spec, DataConfig(skip_corrupt=True), divide=False)
        return f"error: {message} | skip_corrupt: {_describe_splits(splits)}, broken {sorted(splits.broken)}"
    return _describe_splits(splits)


def _describe_splits(splits: Any) -> str:
    """Describe each image in the splits of `load_data`: split, name, class, size and center color."""
    texts = []
    for part, images in splits.parts.items():
        for index, name in enumerate(images.names):
            image = images.image(index)
            texts.append(_describe_image(f"{part}:{name} is {splits.classes[images.labels[index]]}", image))
    return "; ".join(texts)


def _describe_image(name: str, image: Any) -> str:
    """Describe an image by name, size and center color."""
    color = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    return f"{name} {image.width}x{image.height} {color}"


def describe_datasets(folder: Path, table: Path | None) -> str:
    """Describe the result of `load_dataset`."""
    import datasets

    if table is not None:
        data = datasets.load_dataset("csv", data_files=str(table), delimiter=";")
        return "; ".join(str(dict(row)) for part in data.values() for row in part)
    data = datasets.load_dataset("imagefolder", data_dir=str(folder))
    texts = []
    for part, rows in data.items():
        label = rows.features.get("label")
        names = [Path(item["path"]).name for item in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        for number, name in enumerate(names):
            try:
                item = rows[number]
            except Exception as error:
                texts.append(f"{part}:{name} raises {type(error).__name__}: {error}")
                continue
            kind = "of no class" if item.get("label") is None else f"is {label.names[item['label']]}"
            texts.append(_describe_image(f"{part}:{name} {kind}", item["image"]))
    return "; ".join(texts).replace(f"{folder}/", "")


def write_classes(folder: Path, *names: str) -> None:
    """Write a small image of a single color, `0.png`, in each class folder."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (60 * label, 0, 0)).save(folder / name / "0.png")


def exif_rotation(folder: Path) -> None:
    """A 40×20 JPEG with an EXIF rotation of 90 degrees."""
    write_classes(folder, "a", "b")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(folder / "a" / "rotated.jpg", exif=exif)


def sixteen_bits(folder: Path) -> None:
    """A 16-bit PNG at half the maximum value."""
    write_classes(folder, "a", "b")
    Image.new("I;16", (20, 20), 32768).save(folder / "a" / "deep.png")


def transparency(folder: Path) -> None:
    """A transparent PNG."""
    write_classes(folder, "a", "b")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "a" / "clear.png")


def corrupt_files(folder: Path) -> None:
    """A truncated JPEG, and a text file and an empty file with image suffixes."""
    write_classes(folder, "a", "b")
    Image.effect_noise((200, 200), 50).save(folder / "a" / "cut.jpg")
    content = (folder / "a" / "cut.jpg").read_bytes()
    (folder / "a" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "a" / "text.png").write_text("no image")
    (folder / "b" / "empty.png").touch()


def eps_as_png(folder: Path) -> None:
    """PostScript with the suffix `.png`, which Pillow runs in Ghostscript unless formats are restricted."""
    write_classes(folder, "a", "b")
    Image.new("RGB", (20, 20)).save(folder / "a" / "script.eps")
    (folder / "a" / "script.eps").rename(folder / "a" / "script.png")


def links(folder: Path) -> None:
    """Symbolic links to an image and a class folder."""
    outside = folder.parent / "outside-of-links"
    write_classes(outside, "c")
    write_classes(folder, "a", "b")
    (folder / "a" / "link.png").symlink_to(outside / "c" / "0.png")
    (folder / "c").symlink_to(outside / "c")


def named_splits(folder: Path) -> None:
    """Splits `train` and `val`, of which `val` lacks a class."""
    write_classes(folder / "train", "a", "b")
    write_classes(folder / "val", "a")


def split_words_in_names(folder: Path) -> None:
    """Classes whose names contain split names."""
    write_classes(folder, "bridge", "train-station", "test_tube")


def nested_folders(folder: Path) -> None:
    """Images in a folder below a class folder."""
    write_classes(folder, "a", "b")
    write_classes(folder / "a", "monday")


def unusual_names(folder: Path) -> None:
    """An image without a suffix, a hidden macOS file, and a name with brackets."""
    write_classes(folder, "a", "b")
    (folder / "a" / "0.png").rename(folder / "a" / "photo")
    (folder / "a" / "._1.png").write_bytes(b"hidden")
    (folder / "b" / "0.png").rename(folder / "b" / "photo [1].png")


def path_outside(folder: Path) -> None:
    """A table that references an image outside its folder."""
    write_classes(folder, "a", "b")
    write_classes(folder.parent / "private", "c")
    lines = ["file_name,label", "a/0.png,a", "b/0.png,b", "../private/c/0.png,b"]
    (folder / "metadata.csv").write_text("\n".join(lines))


def groups_and_weights(folder: Path) -> None:
    """A semicolon-separated table with labels, groups and weights, as European spreadsheets write it."""
    write_classes(folder, "a", "b")
    lines = ["path;label;patient;weight", "a/0.png;001;7;1", "b/0.png;002;NA;0.5"]
    (folder / "labels.csv").write_text("\n".join(lines))


CASES: dict[str, Callable[[Path], None]] = {
    write.__name__.replace("_", " "): write
    for write in (
        *(exif_rotation, sixteen_bits, transparency, corrupt_files, eps_as_png, links, named_splits),
        *(split_words_in_names, nested_folders, unusual_names, path_outside, groups_and_weights),
    )
}
"""Functions that write a folder of images, by case."""


if __name__ == "__main__":
    main()

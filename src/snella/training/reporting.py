"""Draws the report of a run again, pictures included."""

from pathlib import Path

from rich.console import Console

from snella.analysis import write_report
from snella.analysis.examples import ImageSource
from snella.data import ImageDataset
from snella.training.assembly import load_splits
from snella.training.console import make_console
from snella.training.loading import task_of
from snella.training.run_folder import RunFolder
from snella.training.split_identity import check_splits, find_data


def refresh_report(run: str | Path, console: Console | None = None) -> Path:
    """Write the report of a stored run anew, from its files and its own validation images.

    Where these are gone or changed, the page has no pictures, and a note says why.

    Args:
        run: Folder of the run.
        console: Where to write the note; standard output if None.

    Returns:
        The page.

    Raises:
        FileNotFoundError: This is not the folder of a run.
        ValueError: The run is of another kind, such as a personalised generator.
    """
    folder = RunFolder(run)
    info = folder.read_json("run.json")
    stored, task = info.get("data", {}), task_of(info)
    try:
        shown = _shown_images(folder, stored)
        images: ImageSource | None = None if shown is None else task.pictures(shown, folder.path)
    except (OSError, ValueError, ImportError) as fault:
        (console or make_console()).print(
            f"note: the report has no pictures: {fault}", highlight=False, soft_wrap=True, markup=False
        )
        images = None
    return write_report(folder.path, images)


def _shown_images(folder: RunFolder, stored: dict[str, object]) -> ImageDataset | None:
    """The images that `predictions.json` is about."""
    config = folder.read_config()
    config.data = find_data(folder.path, str(config.data), stored)
    splits = load_splits(config)
    check_splits(folder.path, stored, splits)
    return splits.test if splits.val is None else splits.val

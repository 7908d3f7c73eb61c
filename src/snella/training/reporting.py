"""Draws the report of a run again, pictures included."""

from pathlib import Path

from snella.analysis import write_report
from snella.training.assembly import load_splits
from snella.training.run_folder import RunFolder


def refresh_report(run: str | Path) -> Path:
    """Write the report of a stored run anew, from its files and its own validation images.

    Args:
        run: Folder of the run.

    Returns:
        The page.

    Raises:
        FileNotFoundError: This is not the folder of a run, or its images are gone.
    """
    folder = RunFolder(run)
    return write_report(folder.path, load_splits(folder.read_config()).val.image)

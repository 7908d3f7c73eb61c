"""The folder of a personalisation run."""

from snella.generation.config import DreamBoothConfig
from snella.training.run_folder import RunFolderOf


class DreamBoothFolder(RunFolderOf[DreamBoothConfig]):
    """Paths and small files of one personalisation run."""

    settings_type = DreamBoothConfig
    files = (*RunFolderOf.files, "images.json", "generation.json")
    folders = (*RunFolderOf.folders, "class_images", "samples", "evaluation")

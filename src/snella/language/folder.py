"""The folder of an instruction fine-tuning."""

from snella.language.config import LanguageConfig
from snella.training.run_folder import RunFolderOf

RESULT_FILE = "language.json"


class LanguageFolder(RunFolderOf[LanguageConfig]):
    """Paths and small files of one instruction fine-tuning."""

    settings_type = LanguageConfig
    files = (*RunFolderOf.files, RESULT_FILE)
    folders = (*RunFolderOf.folders, "answers")

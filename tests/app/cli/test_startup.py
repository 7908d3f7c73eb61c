"""Fast startup: heavy libraries are imported only on use."""

import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = ("torch", "torchvision", "timm", "peft", "transformers", "accelerate", "matplotlib", "sklearn", "numpy")


def loaded_by(code, heavy=HEAVY):
    """Return the heavy libraries that a program imported, its output and its exit status."""
    program = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    status = end.code or 0\n"
        f"print('\\n#', status, *[name for name in {heavy!r} if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    printed, _, last = process.stdout.rpartition("\n# ")
    status, *names = last.split()
    return names, printed + process.stderr, int(status)


@pytest.mark.parametrize(
    ("args", "printed", "status"),
    [
        (["--help"], "Fine-tune pre-trained vision models", 0),
        (["--version"], f"snella {version('snella')}", 0),
        (["--completion", "bash"], "_shtab_snella", 0),
        (["train", "--help"], "--target-sparsity", 0),
        (["tain"], "tain", 2),
        (["train", "--epohcs", "3"], "nearest: --epochs", 2),
    ],
)
def test_help_version_and_typos_import_no_heavy_library(args, printed, status):
    names, text, code = loaded_by(f"from snella_app.cli.main import main; status = main({args!r})")
    assert names == [] and printed in text and code == status


def test_the_package_is_also_a_program():
    process = subprocess.run([sys.executable, "-m", "snella", "--version"], capture_output=True, text=True, check=True)
    assert process.stdout == f"snella {version('snella')}\n"


def test_predicting_imports_neither_matplotlib_nor_scikit_learn():
    names, _, _ = loaded_by("import snella_app.runs.predict; status = 0", ("matplotlib", "sklearn", "torch"))
    assert names == ["torch"]


@pytest.mark.parametrize(
    "imports",
    ["import snella, peft", "import peft, snella", "import snella.config", "import snella; snella.SnellaConfig"],
)
def test_peft_has_the_tuner_in_any_import_order(imports):
    code = f"{imports}; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; status = int('SNELLA' in known)"
    assert loaded_by(code)[2] == 1

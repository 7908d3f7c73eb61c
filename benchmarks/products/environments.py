"""Create one virtual environment per tool that reuses this interpreter's packages, so that torch is installed once.

python benchmarks/products/environments.py --cache CACHE [fastai]
"""

import argparse
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # without spacy, which fastai uses only for text
    "fastai": (
        ("--no-deps", "fastai==2.8.*", "fastdownload>=0.0.8,<2"),
        ("fastcore", "fastprogress", "fasttransform", "plum-dispatch<2.10", "cloudpickle"),
    ),
    # dependencies for images only; with speech, text and object detection, pip takes more than ten minutes
    "autogluon": (
        ("--no-deps", "autogluon.multimodal==1.6.*", "autogluon.core==1.6.*", "autogluon.features==1.6.*"),
        (
            "--no-deps",
            "autogluon.common==1.6.*",
            "timm==1.0.3",
            "nlpaug",
            "text-unidecode",
            "pytesseract",
            "pdf2image",
            "setuptools<81",
            "antlr4-python3-runtime==4.9.3",
        ),
        ("lightning>=2.5,<2.7", "torchmetrics<1.8", "omegaconf<2.4", "pytorch-metric-learning<2.9", "nltk", "pytz"),
        ("seqeval", "evaluate", "boto3", "jsonschema", "defusedxml", "scikit-image", "nvidia-ml-py3", "sentencepiece"),
    ),
    "lightly": (("lightly-train==0.18.*",),),
}
"""Arguments of consecutive `pip install` calls, by environment."""

NOT_INSTALLED = {"tabpfn": "downloads its weights from a hub; no package contains them"}
"""Reasons for excluding tools."""

_SHARED = ("torch", "torchvision")


def interpreter(cache: Path, name: str) -> Path:
    """Return the interpreter of an environment; `main` is the current one."""
    return Path(sys.executable) if name == "main" else cache / name / "bin" / "python"


def make(cache: Path, name: str) -> None:
    """Create an environment, unless it exists."""
    if name == "main" or (cache / name / "done").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", cache / name], check=True)
    python = interpreter(cache, name)
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site_packages, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = cache / name / "constraints.txt"
    constraints.write_text("".join(f"{package}=={version(package)}\n" for package in _SHARED))
    for arguments in ENVIRONMENTS[name]:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", constraints, *arguments], check=True)
    (cache / name / "done").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ENVIRONMENTS), help=", ".join(ENVIRONMENTS))
    parser.add_argument("--cache", type=Path, required=True)
    args = parser.parse_args()
    for name in args.names:
        if name in NOT_INSTALLED:
            parser.error(f"{name!r} is not included: {NOT_INSTALLED[name]}")
        if name not in ENVIRONMENTS:
            parser.error(f"names must be among {', '.join(ENVIRONMENTS)}, got {name!r}")
    for name in args.names:
        make(args.cache, name)


if __name__ == "__main__":
    main()

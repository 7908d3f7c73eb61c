"""Golden help and error messages of every command. After an intended change, run

    UPDATE_GOLDEN=1 python -m pytest tests/app/cli/test_golden.py

and read `git diff`.
"""

import os
import shlex
from pathlib import Path

import pytest

from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS

GOLDEN = Path(__file__).parent / "golden"
TRAIN = "train --data digits --backbone test_vit --out run"
ERRORS = [
    "",
    "trian",
    "xyz",
    "--debgu train",
    "train",
    "train --out run",
    "train --model x --learning-rate 1",
    "train --batch 8",
    "train --precision bfloat16",
    f"{TRAIN} --method lora8",
    f"{TRAIN} --device gpu",
    "train --target-sparsty 0.5",
    "predict --model x a.png",
    "inspect --batch-size 8",
    "train --xyz 1",
    "train extra",
    "train --epochs",
    "train --epochs many",
    "train --epochs 1.5",
    "train --epochs=",
    "train --lr x",
    "train --resume=perhaps",
    "train --augment flop",
    "train --mask-loss dise",
    "train --method-options rbf",
    "train --config",
    "train --config missing.yaml",
    "train --config neer.yaml",
    "train --config folder/c.yaml",
    "train --config broken.yaml",
    "train --config deep.yaml",
    "train --config circle.yaml",
    "train --config date.yaml",
    "train --config list.yaml",
    "train --config bytes.yaml",
    "train --config unknown.yaml",
    "train --config wrong.yaml",
    f"{TRAIN} --resume --overwrite",
    f"{TRAIN} --r 3",
    f"{TRAIN} --target-sparsity 1",
    f"{TRAIN} --target-sparsity 70",
    f"{TRAIN} --epochs 0 --seed -1 --warmup-ratio 1 --lr -1",
    f"{TRAIN} --ema 2 --val-fraction 0 --min-lr 2 --lr 1",
    f"{TRAIN} --method lora --scalar-lr 1",
    f"{TRAIN} --r 8 --method-options.r 8",
    f"{TRAIN} --mask-loss dice",
    f"{TRAIN} --weights missing.pth",
    f"{TRAIN} --data folder:",
    "evaluate",
    "evaluate missing",
    "evaluate missing --split tset",
    "evaluate missing --calibrate --skip-corrupt --split val",
    "explain missing --overwrite --neighbors 0",
    "predict",
    "predict missing",
    "predict elves.png",
    "predict missing image.png",
    "predict missing image.png --top-k x",
    "predict --out p.csv",
    "predict --out p.csv elves.png",
    "merge",
    "merge missing",
    "merge missing --out model",
    "merge --out model",
    "export",
    "export missing",
    "export missing --format onxx",
    "export missing --format timm --rank 4",
    "export missing --format lora --rank 0",
    "export missing --format onnx",
    "inspect",
    "inspect missing",
    "inspect missing --backbone test_vit",
    "inspect missing --batch 4 --img-size 32",
    "inspect --backbone test_vit --report",
    "inspect --backbone test_vit --batch 0 --r -1",
    "inspect --backbone test_vit --dtype fp16",
    "data",
    "data chek folder",
    "data check",
    "data check folder --decod",
    "compare",
    "compare --out c",
    "compare --out c --method linear",
    "compare --out c --methods linear --data digits --backbone test_vit --lr-factors 1,x",
    "compare --out c --methods linear --data digits --backbone test_vit --seeds 0",
    "compare --out c --methods linear --data digits --backbone test_vit --workers -1",
    "compare --out c --pretrained perhaps",
    "train --resume runs/photos",
    "dreambooth",
    "dreambooth --data folder:x --pipeline sd3 --out run --method vpt-deep",
    "dreambooth --data folder:x --pipeline sd3 --out run --steps 0 --token ' '",
    "generate",
    "generate run",
    "generate run --out pictures --live perhaps",
    "evaluate-generation",
    "evaluate-generatio",
    "bench --batch 4,x",
    "bench --sparsity 0.7,y",
    "bench --rounds few",
    "language",
    "language --data missing.json --model llama --out run --template missing.txt --max-length 1",
    "evaluate-language",
    "evaluate-language run",
    "demo --epochs x",
]


def compare_or_update(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_matches_the_golden_files(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["--help"] if name is None else [name, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"  snella {name or 'train'}" in text, "no example"
    assert "_" not in "".join(word for word in text.split() if word.startswith("--"))
    assert all(other in text for other in (COMMANDS if name is None else ["--config"]))
    text = text.replace("--images IMAGES, --images+ IMAGES", "--images, --images+ IMAGES")  # as in Python 3.13
    compare_or_update(f"help-{name or 'snella'}.txt", text)


def test_errors_match_the_golden_files(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "near.yaml").write_text("epochs: 3\n")
    (tmp_path / "broken.yaml").write_text("epochs: 3\n  a: [\n")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000)
    (tmp_path / "circle.yaml").write_text("method_options: &a {kernel: *a}\n")
    (tmp_path / "date.yaml").write_text("2001-01-01: 1\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "unknown.yaml").write_text("epochs: 3\nepoks: 3\n")
    (tmp_path / "wrong.yaml").write_text("epochs: many\n")
    before = set(tmp_path.iterdir())
    lines = []
    for line in ERRORS:
        status = main(shlex.split(line))
        lines.append(f"$ snella {line}\n{capsys.readouterr().err}[{status}]\n")
    assert set(tmp_path.iterdir()) == before
    compare_or_update("errors.txt", "\n".join(lines))

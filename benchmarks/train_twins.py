"""Train the twins of the paper's Tables VII to XII, with the outputs of the frozen blocks cached.

python benchmarks/train_twins.py [--out runs/twins] [--tables 7 8 9 10 11 12] [--seeds 5] [--processes 2] [--restore]

Every method of the twins adapts only the last two of twelve blocks, and images are not augmented, so each process
resizes each image once and computes the outputs of the other blocks once per image. The results equal those of `snella
compare --experiment twin-tableN` up to rounding. Recorded times and memory are not comparable. Finished runs are
skipped; a larger --seeds adds runs.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from twin_tables import TABLES, restore

from snella_app.data.datasets import ImageDataset
from snella_lab.comparison.compare import compare
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.options import ExecutionConfig

FROZEN = 10
"""Number of first blocks that no method of the twins adapts."""


class FrozenBlocks:
    """Cache of the outputs of the first `count` blocks of one pre-trained transformer, by image."""

    def __init__(self, count: int = FROZEN) -> None:
        self._count = count
        self._tokens: dict[bytes, Tensor] = {}

    def install(self) -> None:
        """Replace `forward_features` of timm's vision transformers."""
        VisionTransformer.forward_features = lambda model, images, **_: self.forward_features(model, images)

    def forward_features(self, model: VisionTransformer, images: Tensor) -> Tensor:
        """Return the normalized tokens; only the blocks after the first `count` run for a known image.

        Raises:
            ValueError: If one of the first blocks or the patch embedding is adapted.
        """
        tokens = self._frozen_outputs(model, images)
        for block in model.blocks[self._count :]:
            tokens = block(tokens)
        return model.norm(tokens)

    @torch.no_grad()
    def _frozen_outputs(self, model: VisionTransformer, images: Tensor) -> Tensor:
        keys = [image.numpy().tobytes() for image in images]
        missing = [row for row, key in enumerate(keys) if key not in self._tokens]
        if missing:
            blocks = model.blocks[: self._count]
            if any(isinstance(module, BaseTunerLayer) for module in (*blocks.modules(), *model.patch_embed.modules())):
                raise ValueError(f"methods of the twins must not adapt the first {self._count} blocks")
            tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images[missing]))))
            for row, outputs in zip(missing, blocks(tokens), strict=True):
                self._tokens[keys[row]] = outputs.clone()
        return torch.stack([self._tokens[key] for key in keys])


class ResizedImages:
    """Cache of transformed images, by transform, mode, size and pixels. Transforms must not be random."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, bytes], Tensor] = {}

    def install(self) -> None:
        """Replace `ImageDataset._item`."""
        ImageDataset._item = lambda dataset, index: self.item(dataset, index)

    def item(self, dataset: ImageDataset, index: int) -> tuple[Any, ...]:
        """Return the transformed image, its target, and, if items are weighted, its weight."""
        image = dataset.source.load(dataset.rows[index])
        key = (f"{dataset.transform} {image.mode} {image.size}", hashlib.sha256(image.tobytes()).digest())
        if key not in self._images:
            self._images[key] = dataset.transform(image)
        return self._images[key], *dataset.target_and_weight(index)


def train(out: Path, tables: list[int], seeds: int) -> None:
    """Train the runs of the tables that no other process trains, and write the reports."""
    torch.set_num_threads(1)
    FrozenBlocks().install()
    ResizedImages().install()
    for table in tables:
        experiment = read_experiment(f"twin-table{table}", {"seeds": seeds})
        compare(experiment, out, ExecutionConfig(workers=0, threads=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/twins"))
    parser.add_argument("--tables", type=int, nargs="+", default=list(TABLES.values()))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--restore", action="store_true", help="start from the committed rows in a new folder")
    args = parser.parse_args()
    if args.restore:
        if args.out.exists():
            raise SystemExit(f"--out must not exist with --restore, got {args.out}; omit --restore to resume it")
        restore(args.out)
        # other tables are added when they are trained
        read_experiment(f"twin-table{args.tables[0]}", {"seeds": args.seeds}).write(args.out)
    if args.processes == 1:
        train(args.out, args.tables, args.seeds)
        return
    command = [sys.executable, __file__, "--out", str(args.out), "--seeds", str(args.seeds), "--processes", "1"]
    command += ["--tables", *map(str, args.tables)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment) for _ in range(args.processes)]
    if any([process.wait() for process in processes]):
        raise SystemExit("a process failed; its error is above; run the command again to continue")


if __name__ == "__main__":
    main()

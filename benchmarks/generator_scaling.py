"""Size of the update of `snella dreambooth` during training, by method and scaling.

python benchmarks/generator_scaling.py [--steps 500]     appends to generator_scaling.jsonl
python benchmarks/generator_scaling.py --table           writes docs/notes/checks.md

The model is one joint attention block with the width of Stable Diffusion 3 and random weights. It is trained on four
random latents with the defaults of `snella dreambooth`, but with one image per step and plain AdamW.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from documents import markdown_table, put_between
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from snella_app.config.sections import BaseRunConfig
from snella_app.console import make_console
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions
from snella_lab.recipes.config import RecipeMethodConfig
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder, DreamBoothOptimConfig
from snella_lab.recipes.dreambooth.pipeline import LatentImages, PromptEmbedding
from snella_lab.recipes.dreambooth.train import DreamBoothTrainer, FlowMatching, TrainingSet
from snella_lab.recipes.trainer import adapt_headless

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parent.parent / "docs" / "notes" / "checks.md"
METHODS = (("lora-8", None), ("snella-8", 1.0), ("snella-8", 3.0), ("snella-8", 10.0), ("snella-8", 100.0))
"""Methods and scalings."""
STEPS = (50, 100, 200, 500)
"""Steps at which the update is measured."""
HEADS = 24
"""Number of attention heads of width 64."""
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.table:
        put_between(PAGE, "<!-- generator scaling begin -->", "<!-- generator scaling end -->", table(read_rows(ROWS)))
        return
    for seed in args.seeds:
        for method, scaling in METHODS:
            sizes = measure(method, scaling, args.steps, seed)
            row = {"method": method, "scaling": scaling, "steps": args.steps, "seed": seed, **sizes}
            append_rows(args.out, [{**row, **conditions("cpu", ("torch", "peft", "diffusers"))}])


def measure(method: str, scaling: float | None, steps: int, seed: int) -> dict[str, Any]:
    """Train one block and return the root mean square of the weights, and of the update at several steps."""
    transformer = random_transformer(HEADS, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (4, transformer.config.in_channels, 16, 16)
    images = LatentImages(torch.randn(shape, generator=generator), torch.zeros(shape), shift=0.0, scale=1.0)
    text_width, pooled_width = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    tokens = torch.randn(1, 16, text_width, generator=generator)
    prompt = PromptEmbedding(tokens, torch.randn(1, pooled_width, generator=generator))
    with tempfile.TemporaryDirectory(prefix="snella-scaling-") as out:
        config = DreamBoothConfig(
            method=RecipeMethodConfig(name=method, scaling=scaling),
            optim=DreamBoothOptimConfig(accumulation=1, optimizer="adamw", gradient_checkpointing=False),
            run=BaseRunConfig(out=f"{out}/run", seed=seed, device="cpu"),
            data="folder:random",
            pipeline="random",
            steps=steps,
            save_every=steps,
        )
        run = DreamBoothFolder(config.run.out)
        config, _ = run.resolve_resume(config)
        run.prepare(config, is_resumed=False)
        torch.manual_seed(seed)
        model = adapt_headless(config.method.name, transformer, config.method.all_options())
        objective = FlowMatching(model, FlowMatchEulerDiscreteScheduler(shift=3.0), "logit_normal", True)
        trainer = DreamBoothTrainer(objective, config, run, make_console(), TrainingSet(images, prompt))
        recorder = UpdateRecorder(model)
        trainer.add_callback(recorder)
        trainer.fit()
    return {"weight_rms": recorder.weight_rms, "update_rms": recorder.update_rms}


def random_transformer(heads: int, seed: int) -> SD3Transformer2DModel:
    """Create a Stable Diffusion 3 transformer with one joint attention block and random weights."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=16,
        num_layers=1,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=256,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=256,
        pos_embed_max_size=16,
    )


class UpdateRecorder(TrainerCallback):
    """Callback that records the root mean squares of the adapted weights and, at the steps in `STEPS`, their updates.

    Attributes:
        weight_rms: Root mean square of all adapted weights.
        update_rms: Root mean square of all updates by step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.weight_rms = rms([layer.get_base_layer().weight for layer in self.layers])
        self.update_rms: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the update."""
        if state.global_step in STEPS:
            updates = [layer.get_delta_weight("default") for layer in self.layers]
            self.update_rms[str(state.global_step)] = rms(updates)


@torch.no_grad()
def rms(matrices: list[Tensor]) -> float:
    """Return the root mean square of the entries of several matrices."""
    total = sum(float(matrix.double().square().sum()) for matrix in matrices)
    return float(f"{(total / sum(matrix.numel() for matrix in matrices)) ** 0.5:.4g}")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ratio of the update to the weights by method, scaling, and step, as the mean over seeds."""
    lines = []
    for method, scaling in METHODS:
        runs = [row for row in rows if (row["method"], row["scaling"]) == (method, scaling)]
        name = f"`{method}`" if scaling is None else f"`{method}`, `--scaling {scaling:g}`"
        lines.append([name, *(f"{100 * mean_ratio(runs, step):.2g}%" for step in STEPS)])
    return markdown_table(["", *(f"step {step}" for step in STEPS)], lines, left=1)


def mean_ratio(runs: list[dict[str, Any]], step: int) -> float:
    """Return the mean ratio of the update to the weights over runs."""
    return sum(run["update_rms"][str(step)] / run["weight_rms"] for run in runs) / len(runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Minimal DreamBooth: fine-tune a Stable Diffusion 3 transformer on one photograph with diffusers.

A small random transformer replaces the real one, pixels replace VAE latents, and random tensors replace embeddings.
`snella dreambooth` trains a real pipeline.
"""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer

OUT = Path("runs/examples/diffusers_dreambooth")
STEPS = 60


def make_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=32, pos_embed_max_size=32, patch_size=2, in_channels=3, out_channels=3, num_layers=4,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
        pooled_projection_dim=32,
    )  # fmt: skip


photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 127.5 - 1  # [1, 3, 427, 640]
latents = F.interpolate(photo, size=(32, 32), mode="area")
torch.manual_seed(1)
prompt = {"encoder_hidden_states": torch.randn(1, 8, 32), "pooled_projections": torch.randn(1, 32)}


def flow_loss(transformer: torch.nn.Module, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Compute the rectified-flow loss of the predicted velocity at `sigma`, `[n, 1, 1, 1]`."""
    noisy = (1 - sigma) * latents + sigma * noise
    embeddings = {name: value.expand(len(noise), *value.shape[1:]) for name, value in prompt.items()}
    velocity = transformer(hidden_states=noisy, timestep=1000 * sigma.flatten(), **embeddings).sample
    return F.mse_loss(velocity, noise - latents)


# target_modules default to the attention projections; the randomly initialized output layer is trained in full
model = get_peft_model(make_transformer(), SnellaConfig(r=8, target_sparsity=0.8, modules_to_save=["proj_out"]))
optimizer = create_snella_optimizer(model, lr=1e-2)
allocator = BudgetAllocator(model, total_epochs=6, steps_per_epoch=STEPS // 6).attach(optimizer)

eval_inputs = torch.randn(8, 3, 32, 32), torch.linspace(0.1, 0.9, 8).reshape(8, 1, 1, 1)
with torch.no_grad():
    print(f"loss before: {flow_loss(model, *eval_inputs).item():.3f}")
for _ in range(STEPS):
    flow_loss(model, torch.randn(4, 3, 32, 32), torch.rand(4, 1, 1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    trained_loss = flow_loss(model, *eval_inputs).item()
print(f"loss after {STEPS} steps: {trained_loss:.3f}, {sum(allocator.budgets.values()):,} weights changed")

model.save_pretrained(OUT / "adapter")
# with a real pipeline: PeftModel.from_pretrained(pipeline.transformer, …)
loaded = PeftModel.from_pretrained(make_transformer(), OUT / "adapter")
with torch.no_grad():
    loaded_loss = flow_loss(loaded, *eval_inputs).item()
print(f"loss of the loaded adapter: {loaded_loss:.3f}")

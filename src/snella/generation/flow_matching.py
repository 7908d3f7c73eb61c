"""The loss that Stable Diffusion 3 is trained by."""

from __future__ import annotations

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from snella.generation.conditioning import PromptEmbedding

_LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE = 0.0, 1.0, 1.29


class FlowMatching:
    """Rectified flow between images and noise.

    z_σ = (1 − σ) z + σ ε,      loss = w(σ) · mean |v(z_σ, σ) − (ε − z)|²

    `v` is the transformer. With `precondition` it is the images that are compared, z against z_σ − σ v, which weights
    the same error by σ².

    Args:
        scheduler: Of the pipeline; a fresh one of its configuration is used, since sampling changes a scheduler.
        weighting: `logit_normal` and `mode` draw the times unevenly; `sigma_sqrt` and `cosmap` draw them evenly and
            weight the loss; `uniform` does neither.
        precondition: Compare images instead of velocities.

    Source: Esser et al., arXiv 2403.03206, section 3, with the defaults of diffusers' DreamBooth training.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, weighting: str, precondition: bool) -> None:
        fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas, self.times = fresh.sigmas[: len(fresh.timesteps)], fresh.timesteps
        self.weighting = weighting
        self.precondition = precondition

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """So many places in [0, 1) of the list of times, as the weighting wants them distributed."""
        return compute_density_for_timestep_sampling(
            self.weighting, count, _LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE, generator=generator
        )

    def losses(
        self, transformer: nn.Module, images: Tensor, noise: Tensor, times: Tensor, prompt: PromptEmbedding
    ) -> Tensor:
        """Loss of each image.

        Args:
            transformer: Predicts velocities.
            images: Latent images, `[n, c, h, w]`.
            noise: `[n, c, h, w]`.
            times: Places in the list of times, `[n]`, in [0, 1).
            prompt: Of all images.

        Returns:
            `[n]`, float32.
        """
        device = images.device
        indices = (times * len(self.times)).long().clamp_max(len(self.times) - 1).cpu()
        sigmas = self.sigmas[indices].to(device)[:, None, None, None]
        noisy = (1.0 - sigmas) * images + sigmas * noise
        tokens, pooled = prompt.repeated(len(images), device)
        velocity = transformer(
            hidden_states=noisy,
            timestep=self.times[indices].to(device),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        error = noisy - sigmas * velocity - images if self.precondition else velocity - (noise - images)
        return (compute_loss_weighting_for_sd3(self.weighting, sigmas) * error.square()).mean(dim=(1, 2, 3))

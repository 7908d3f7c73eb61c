import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from snella_lab.recipes.dreambooth.pipeline import LatentImages, PromptEmbedding
from snella_lab.recipes.dreambooth.train import FlowMatching

PROMPT = PromptEmbedding(torch.ones(1, 3, 5), torch.ones(1, 4))


class Constant(nn.Module):
    """Transformer that predicts a constant velocity and records its inputs."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.received = hidden_states, timestep, encoder_hidden_states, pooled_projections
        return (self.velocity.expand_as(hidden_states),)


def loss_of(weighting="uniform", precondition=False, shift=1.0, time=0.25, velocity=0.5):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    model = Constant(torch.tensor(velocity))
    loss = FlowMatching(model, FlowMatchEulerDiscreteScheduler(shift=shift), weighting, precondition)
    return loss(images, noise, torch.tensor([time, time]), PROMPT), images, noise, model


def test_loss_is_the_squared_error_of_the_velocity():
    losses, images, noise, model = loss_of(time=0.25)
    sigma = 1.0 - 0.25  # timesteps decrease from 1
    torch.testing.assert_close(losses, (0.5 - (noise - images)).square().mean(dim=(1, 2, 3)))
    noisy, timestep, tokens, pooled = model.received
    torch.testing.assert_close(noisy, (1 - sigma) * images + sigma * noise)
    torch.testing.assert_close(timestep, torch.tensor([750.0, 750.0]))
    assert (tokens.shape, pooled.shape) == ((2, 3, 5), (2, 4))


def test_preconditioning_weights_the_error_by_sigma_squared():
    plain = loss_of(precondition=False, time=0.4)[0]
    torch.testing.assert_close(loss_of(precondition=True, time=0.4)[0], plain * 0.6**2)


def test_sigmas_use_the_shift_of_the_scheduler():
    sigma = 0.75 * 3.0 / (1 + 2.0 * 0.75)
    noisy, images, noise = (result := loss_of(shift=3.0, time=0.25))[3].received[0], result[1], result[2]
    torch.testing.assert_close(noisy, (1 - sigma) * images + sigma * noise)


def test_perfect_prediction_has_zero_loss():
    torch.manual_seed(0)
    images, noise = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    for precondition in (False, True):
        model = Constant(noise - images)
        loss = FlowMatching(model, FlowMatchEulerDiscreteScheduler(), "logit_normal", precondition)
        loss_value = loss(images, noise, torch.tensor([0.7]), PROMPT)
        assert loss_value.item() == pytest.approx(0.0, abs=1e-12)


def test_sampling_scheduler_is_not_modified():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    loss = FlowMatching(nn.Identity(), scheduler, "uniform", True)
    assert len(loss.sigmas) == len(loss.times) == 1000 and len(scheduler.timesteps) == 3


def test_logit_normal_times_concentrate_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    loss = FlowMatching(nn.Identity(), FlowMatchEulerDiscreteScheduler(), "logit_normal", True)
    times = loss.sample_times(4000, generator)
    # P(|u - 1/2| < 1/4) = P(|normal| < ln 3) = 0.728
    assert ((times - 0.5).abs() < 0.25).float().mean().item() == pytest.approx(0.728, abs=0.03)
    assert bool(((times > 0) & (times < 1)).all())


def test_latents_are_sampled_shifted_and_scaled():
    images = LatentImages(torch.full((3, 1, 40, 40), 2.0), torch.full((3, 1, 40, 40), 0.5), shift=0.4, scale=1.5)
    latents = images.sample([2], torch.Generator().manual_seed(0))
    assert latents.mean().item() == pytest.approx((2.0 - 0.4) * 1.5, abs=0.06)
    assert latents.std().item() == pytest.approx(0.75, rel=0.06)
    assert torch.equal(latents, images.sample([0], torch.Generator().manual_seed(0)))

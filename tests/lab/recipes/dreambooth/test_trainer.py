import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from snella_lab.recipes.dreambooth import FlowMatching
from snella_lab.recipes.dreambooth.pipeline import LatentImages, PromptEmbedding

PROMPT = PromptEmbedding(torch.ones(1, 3, 5), torch.ones(1, 4))


class Constant(nn.Module):
    """A transformer that predicts one velocity and keeps what it was asked."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.asked = hidden_states, timestep, encoder_hidden_states, pooled_projections
        return (self.velocity.expand_as(hidden_states),)


def loss_of(weighting="uniform", precondition=False, shift=1.0, time=0.25, velocity=0.5):
    torch.manual_seed(0)
    images, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    loss = FlowMatching(FlowMatchEulerDiscreteScheduler(shift=shift), weighting, precondition)
    model = Constant(torch.tensor(velocity))
    return loss.losses(model, images, noise, torch.tensor([time, time]), PROMPT), images, noise, model


def test_the_loss_is_the_distance_from_the_straight_velocity():
    found, images, noise, model = loss_of(time=0.25)
    sigma = 1.0 - 0.25  # the list of times falls from 1
    torch.testing.assert_close(found, (0.5 - (noise - images)).square().mean(dim=(1, 2, 3)))
    noisy, timestep, tokens, pooled = model.asked
    torch.testing.assert_close(noisy, (1 - sigma) * images + sigma * noise)
    torch.testing.assert_close(timestep, torch.tensor([750.0, 750.0]))
    assert (tokens.shape, pooled.shape) == ((2, 3, 5), (2, 4))


def test_comparing_images_weights_the_same_error_by_the_square_of_sigma():
    plain = loss_of(precondition=False, time=0.4)[0]
    torch.testing.assert_close(loss_of(precondition=True, time=0.4)[0], plain * 0.6**2)


def test_times_are_shifted_as_the_scheduler_says():
    sigma = 0.75 * 3.0 / (1 + 2.0 * 0.75)
    noisy, images, noise = (found := loss_of(shift=3.0, time=0.25))[3].asked[0], found[1], found[2]
    torch.testing.assert_close(noisy, (1 - sigma) * images + sigma * noise)


def test_a_perfect_prediction_has_no_loss():
    torch.manual_seed(0)
    images, noise = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    for precondition in (False, True):
        loss = FlowMatching(FlowMatchEulerDiscreteScheduler(), "logit_normal", precondition)
        found = loss.losses(Constant(noise - images), images, noise, torch.tensor([0.7]), PROMPT)
        assert found.item() == pytest.approx(0.0, abs=1e-12)


def test_the_scheduler_that_draws_pictures_is_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    loss = FlowMatching(scheduler, "uniform", True)
    assert len(loss.sigmas) == len(loss.times) == 1000 and len(scheduler.timesteps) == 3


def test_logit_normal_times_crowd_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    loss = FlowMatching(FlowMatchEulerDiscreteScheduler(), "logit_normal", True)
    times = loss.draw_times(4000, generator)
    # P(|u - 1/2| < 1/4) = P(|normal| < ln 3) = 0.728
    assert ((times - 0.5).abs() < 0.25).float().mean().item() == pytest.approx(0.728, abs=0.03)
    assert bool(((times > 0) & (times < 1)).all())


def test_latents_are_drawn_shifted_and_scaled():
    images = LatentImages(torch.full((3, 1, 40, 40), 2.0), torch.full((3, 1, 40, 40), 0.5), shift=0.4, scale=1.5)
    drawn = images.draw([2], torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx((2.0 - 0.4) * 1.5, abs=0.06)
    assert drawn.std().item() == pytest.approx(0.75, rel=0.06)
    assert torch.equal(drawn, images.draw([0], torch.Generator().manual_seed(0)))

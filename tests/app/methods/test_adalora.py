import pytest
import torch
from torch.nn.functional import cross_entropy

from snella_app.methods import build_method, load_trained, save_trained
from snella_app.methods.peft_methods import RankSchedule, orthogonality

LABELS = torch.tensor([0, 1, 2, 0])


def ranks(model):
    """Return the number of nonzero singular values of each layer."""
    return [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, images, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        (cross_entropy(model(images), LABELS) + orthogonality(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_mean_rank_decreases_from_1_5_r_to_r(make_model, images):
    model = build_method("adalora-2", make_model()).train()
    optimizer = optimizer_of(model)
    schedule = RankSchedule(model, 20).attach(optimizer)
    config = schedule.config
    assert (config.init_r, config.target_r, config.tinit, config.tfinal, config.total_step) == (3, 2, 2, 10, 20)
    train(model, images, optimizer, 3)
    assert ranks(model) == [3] * 24
    train(model, images, optimizer, 17, first=3)
    assert sum(ranks(model)) == 2 * 24
    assert len(set(ranks(model))) > 1
    assert schedule.step == 20


def test_a_configured_schedule_is_used(make_model):
    schedule = RankSchedule(build_method("adalora-2", make_model(), tinit=3, tfinal=4), 10)
    assert (schedule.config.tinit, schedule.config.tfinal, schedule.config.total_step) == (3, 4, 10)
    with pytest.raises(ValueError, match=r"tinit \+ tfinal must be less than the 7 steps of the run, got 3 \+ 4"):
        RankSchedule(build_method("adalora-2", make_model(), tinit=3, tfinal=4), 7)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_support_a_schedule(steps, make_model, images):
    model = build_method("adalora-2", make_model()).train()
    optimizer = optimizer_of(model)
    RankSchedule(model, steps).attach(optimizer)
    train(model, images, optimizer, steps)
    assert sum(ranks(model)) == (3 if steps == 1 else 2) * 24


def test_a_resumed_run_matches_an_uninterrupted_run_bit_for_bit(make_model, images, tmp_path):
    uninterrupted = build_method("adalora-2", make_model()).train()
    optimizer = optimizer_of(uninterrupted)
    RankSchedule(uninterrupted, 10).attach(optimizer)
    for first in (0, 6):
        train(uninterrupted, images, optimizer, 6 if first == 0 else 4, first)
        if first == 0:
            save_trained(uninterrupted, tmp_path)
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = load_trained(tmp_path, make_model()).train()
    optimizer = optimizer_of(resumed)
    schedule = RankSchedule(resumed, 10).attach(optimizer)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert schedule.step == 6
    train(resumed, images, optimizer, 4, first=6)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True))
    assert sum(ranks(resumed)) == 48


def test_pruned_ranks_are_saved_as_zeros_and_reload_bit_for_bit(make_model, images, tmp_path):
    model = build_method("adalora-2", make_model()).train()
    optimizer = optimizer_of(model)
    schedule = RankSchedule(model, 4).attach(optimizer)
    train(model, images, optimizer, 4)
    assert schedule.config.rank_pattern is not None
    save_trained(model.eval(), tmp_path)
    assert schedule.config.rank_pattern is not None
    loaded = load_trained(tmp_path, make_model())
    assert ranks(loaded) == ranks(model)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_the_penalty_is_the_mean_distance_from_orthogonality(make_model):
    model = build_method("adalora-2", make_model(), orth_reg_weight=0.25)
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            factor = p if "lora_A" in name else p.T
            norms.append((factor @ factor.T - torch.eye(3)).square().sum().sqrt())
    assert len(norms) == 48
    torch.testing.assert_close(orthogonality(model), 0.25 * sum(norms) / 48)


def test_the_schedule_rejects_other_adapters(make_model):
    model = build_method("lora-2", make_model())
    with pytest.raises(TypeError, match="model must have an AdaLoRA adapter, got LoraModel"):
        RankSchedule(model, 10)

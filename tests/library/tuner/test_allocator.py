"""Budget allocator in training: budgets, order, resumption and errors."""

from __future__ import annotations

import inspect
import io
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from snella import BudgetAllocator, create_snella_optimizer
from snella.allocation import budget_at
from snella.allocator import _ZeroGradHook, allocate
from snella.importance import ImportanceTracker
from snella.matrices import adapted_matrices

EPOCHS, STEPS = 4, 3


def make_optimizer(model, cls=torch.optim.AdamW, **settings):
    return create_snella_optimizer(model, cls, **{"lr": 1e-2, "scalar_lr": 1e-3} | settings)


def step(case, model, optimizer, number):
    """Run one training step on data that depends only on the step number."""
    optimizer.zero_grad()
    case.run(model, case.inputs(number)).square().sum().backward()
    optimizer.step()


def train(case, model, optimizer, first=1, last=EPOCHS * STEPS):
    model.train()
    for number in range(first, last + 1):
        step(case, model, optimizer, number)


def make_allocator(model, **settings):
    return BudgetAllocator(model, **{"total_epochs": EPOCHS, "steps_per_epoch": STEPS} | settings)


# budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_number_of_nonzeros_equals_budget_after_every_allocation(kind, preset):
    # the authors' comparison is strict, so the smallest entry of a dense matrix becomes zero
    margin = 1 if preset == "official" else 0
    model = kind.adapted(preset=preset)
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    model.train()
    for number in range(1, EPOCHS * STEPS + 1):
        step(kind, model, optimizer, number)
        assert sum(allocator.budgets.values()) == allocator.history[-1]["budget"]
        if number % STEPS == 0:
            assert all(m.nonzeros() == m.budget - margin * (m.budget == m.size) for m in allocator.matrices)
    assert sum(allocator.budgets.values()) == allocator.target_budget
    assert allocator.target_budget == allocator.total_weights - round(0.7 * allocator.total_weights)
    assert len(allocator.history) == EPOCHS + 1


def test_history_records_every_allocation(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer)
    assert [entry["step"] for entry in allocator.history] == [0, 3, 6, 9, 12]
    assert [(entry["t"], entry["total"]) for entry in allocator.history] == [(t, 4) for t in range(5)]
    expected = [budget_at(t, 4, allocator.total_weights, allocator.target_budget) for t in range(5)]
    assert [entry["budget"] for entry in allocator.history] == expected
    assert allocator.history[0]["budgets"] == {"lin0": 120, "lin1": 96}
    assert allocator.history[0]["importance"] == {"lin0": 0.0, "lin1": 0.0}
    assert all(value > 0 for entry in allocator.history[1:] for value in entry["importance"].values())
    for entry in allocator.history[1:]:
        assert list(entry["budgets"].values()) == allocate(
            list(entry["importance"].values()), [120, 96], entry["budget"]
        )
    assert allocator.budgets == allocator.history[-1]["budgets"]


def test_history_is_bounded_with_frequent_allocations(mlp):
    model = mlp.adapted(realloc_every=1)
    optimizer = make_optimizer(model)
    allocator = BudgetAllocator(model, total_epochs=2, steps_per_epoch=301).attach(optimizer)
    train(mlp, model, optimizer, last=602)
    steps = [entry["step"] for entry in allocator.history]
    assert len(steps) == 101 and steps == sorted(steps)
    assert {0, 301, 602} <= set(steps)
    assert max(after - before for before, after in pairwise(steps)) <= 7
    # a resumed run has the same entries
    half = BudgetAllocator(mlp.adapted(realloc_every=1), total_epochs=2, steps_per_epoch=301)
    half.load_state_dict(allocator.state_dict())
    assert half.history == allocator.history


def test_realloc_every_n_steps(mlp):
    model = mlp.adapted(realloc_every=5)
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer)
    assert [entry["step"] for entry in allocator.history] == [0, 5, 10, 12]
    assert [(entry["t"], entry["total"]) for entry in allocator.history] == [(0, 12), (5, 12), (10, 12), (12, 12)]
    assert sum(allocator.budgets.values()) == allocator.target_budget


def test_training_that_stops_within_an_epoch_reaches_the_target(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model, total_steps=10).attach(optimizer)
    train(mlp, model, optimizer, last=10)
    assert [(entry["step"], entry["t"]) for entry in allocator.history] == [(0, 0), (3, 1), (6, 2), (9, 3), (10, 4)]
    assert sum(allocator.budgets.values()) == allocator.target_budget


def test_steps_after_the_end_do_not_change_budgets(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer, last=EPOCHS * STEPS + 6)
    assert len(allocator.history) == EPOCHS + 1


def test_schedule_starts_at_init_sparsity(mlp):
    allocator = make_allocator(mlp.adapted(init_sparsity=0.5))
    assert sum(allocator.budgets.values()) == 108
    assert [m.nonzeros() for m in allocator.matrices] == list(allocator.budgets.values())


def test_constant_schedule_is_at_target_from_the_first_step(mlp):
    model = mlp.adapted(schedule="constant")
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    assert sum(allocator.budgets.values()) == allocator.target_budget
    train(mlp, model, optimizer)
    assert {entry["budget"] for entry in allocator.history} == {allocator.target_budget}
    assert len({tuple(entry["budgets"].values()) for entry in allocator.history}) > 1


def test_uniform_allocation_depends_only_on_size(mlp):
    model = mlp.adapted(allocation="uniform", kernel="p_linear")
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer)
    for entry in allocator.history:
        assert list(entry["budgets"].values()) == allocate([120.0, 96.0], [120, 96], entry["budget"])


@pytest.mark.parametrize("metric", ["sensitivity", "magnitude", "delta_magnitude", "delta_mean_magnitude"])
def test_every_metric_changes_budgets_and_reaches_the_target(mlp, metric):
    model = mlp.adapted(importance=metric)
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer)
    assert sum(allocator.budgets.values()) == allocator.target_budget
    assert list(allocator.budgets.values()) != allocate([120.0, 96.0], [120, 96], allocator.target_budget)


def test_frozen_matrices_are_reported_and_min_layer_share_prevents_them(mlp):
    for share, frozen in ((0.0, ["lin1"]), (0.2, [])):
        model = mlp.adapted(min_layer_share=share)
        optimizer = make_optimizer(model)
        allocator = make_allocator(model).attach(optimizer)
        model.train()
        with pytest.warns(UserWarning, match="1 of 2 adapted matrices got no gradient in the first 5 steps: 'lin1'"):
            for number in range(1, EPOCHS * STEPS + 1):
                optimizer.zero_grad()
                mlp.run(model, mlp.inputs(number)).square().sum().backward()
                allocator.matrices[1].layer.snella_A["default"].grad.zero_()
                allocator.matrices[1].layer.snella_B["default"].grad.zero_()
                optimizer.step()
        assert allocator.frozen == frozen
    assert allocator.budgets["lin1"] == int(0.2 * allocator.target_budget * 96 / 216)


def test_adapter_name_selects_the_adapter(mlp):
    model = mlp.adapted()
    model.add_adapter("second", mlp.config(target_sparsity=0.5))
    model.set_adapter("second")
    assert make_allocator(model).adapter_name == "second"
    allocator = make_allocator(model, adapter_name="default")
    assert allocator.adapter_name == "default"
    assert allocator.target_budget == 216 - round(0.7 * 216)


# order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_importance_is_updated_before_the_step_or_after_it_with_official_preset(mlp, preset):
    model = mlp.adapted(preset=preset, update_dropout=0.0, update_drop_path=0.0)
    optimizer = make_optimizer(model, torch.optim.SGD, lr=1e-3)
    allocator = make_allocator(model).attach(optimizer)
    by_hand = ImportanceTracker(adapted_matrices(model), zero_init_ema=preset == "official")
    model.train()
    for number in (1, 2, 3):
        optimizer.zero_grad()
        mlp.run(model, mlp.inputs(number)).square().sum().backward()
        if preset == "paper":
            by_hand.update()
        optimizer.step()
        if preset == "official":
            by_hand.update()
    assert allocator.importance.scores() == by_hand.scores()
    assert allocator.history[-1]["importance"] == dict(zip(["lin0", "lin1"], by_hand.scores(), strict=True))


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_update_and_allocate_equals_attach(mlp, preset):
    settings = {"preset": preset, "update_dropout": 0.0, "update_drop_path": 0.0}
    attached, called = mlp.adapted(**settings), mlp.adapted(**settings)
    optimizer = make_optimizer(attached)
    reference = make_allocator(attached).attach(optimizer)
    train(mlp, attached, optimizer)
    optimizer, allocator = make_optimizer(called), make_allocator(called)
    called.train()
    for number in range(1, EPOCHS * STEPS + 1):
        optimizer.zero_grad()
        mlp.run(called, mlp.inputs(number)).square().sum().backward()
        if preset == "official":
            optimizer.step()
        allocator.update_and_allocate(number)
        if preset == "paper":
            optimizer.step()
    assert allocator.history == reference.history
    assert all(torch.equal(tensor, attached.state_dict()[name]) for name, tensor in called.state_dict().items())


def test_detached_allocator_is_not_updated(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    allocator.detach()
    with pytest.warns(UserWarning, match="after 2 optimizer steps no budget allocator is attached"):
        train(mlp, model, optimizer, last=5)
    assert allocator.step == 0
    allocator.attach(optimizer)
    train(mlp, model, optimizer, last=3)
    assert allocator.step == 3


def test_detaching_one_of_two_allocators_does_not_warn(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    first = make_allocator(model).attach(optimizer)
    second = make_allocator(model).attach(optimizer)
    first.detach()
    train(mlp, model, optimizer, last=3)
    assert (first.step, second.step) == (0, 3)


# resuming -----------------------------------------------------------------------------------------------------------


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("restores_first", [True, False], ids=["load-then-attach", "attach-then-load"])
@pytest.mark.parametrize(
    ("name", "stop"), [("mlp", 1), ("mlp", 5), ("mlp", 6), ("mlp", 11), ("conv", 5), ("timm_vit", 6), ("gpt2", 5)]
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(cases, name, stop, restores_first):
    kind = cases[name]
    settings = {"realloc_every": 2} if stop == 11 else {}
    complete = kind.adapted(**settings)
    optimizer = make_optimizer(complete)
    reference = make_allocator(complete).attach(optimizer)
    _without_dropout(complete)
    start = state_of(complete)
    train(kind, complete, optimizer)

    first = kind.adapted(**settings)
    first.load_state_dict(start)
    _without_dropout(first)
    optimizer = make_optimizer(first)
    make_allocator(first).attach(optimizer)
    train(kind, first, optimizer, last=stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)

    second = kind.adapted(**settings)
    second.load_state_dict(checkpoint["model"])
    _without_dropout(second)
    optimizer = make_optimizer(second)
    allocator = make_allocator(second)
    if restores_first:
        optimizer.load_state_dict(checkpoint["optimizer"])
        allocator.attach(optimizer)
    else:
        allocator.attach(optimizer)
        optimizer.load_state_dict(checkpoint["optimizer"])
    assert allocator.step == stop
    train(kind, second, optimizer, first=stop + 1)
    assert allocator.history == reference.history
    assert all(torch.equal(tensor, complete.state_dict()[name]) for name, tensor in second.state_dict().items())


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_state_dict_restores_budgets_importance_and_history(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    train(mlp, model, optimizer, last=7)
    other = make_allocator(mlp.adapted())
    other.load_state_dict(allocator.state_dict())
    assert (other.step, other.history, other.budgets) == (7, allocator.history, allocator.budgets)
    assert other.importance.scores() == allocator.importance.scores()
    assert [m.nonzeros() for m in other.matrices] == list(allocator.budgets.values())


def test_optimizer_groups_do_not_contain_allocator_state(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "snella_allocator" not in optimizer.param_groups[0]
    assert "snella_allocator" in optimizer.state_dict()["param_groups"][0]


def test_optimizer_state_contains_the_allocators_of_all_adapters(mlp):
    def attach_both(*names):
        model = mlp.adapted()
        model.add_adapter("second", mlp.config(target_sparsity=0.5))
        model.base_model.set_adapter(["default", "second"])
        optimizer = make_optimizer(model)
        return model, optimizer, {name: make_allocator(model, adapter_name=name).attach(optimizer) for name in names}

    model, optimizer, allocators = attach_both("default", "second")
    train(mlp, model, optimizer, last=7)
    _, resumed_optimizer, resumed = attach_both("second", "default")
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    for name, allocator in allocators.items():
        assert resumed[name].budgets == allocator.budgets and resumed[name].history == allocator.history


def test_optimizer_state_contains_the_allocators_of_all_models(mlp):
    def attach_both():
        models = nn.ModuleList([mlp.adapted(), mlp.adapted(target_sparsity=0.9)])
        optimizer = make_optimizer(models)
        return models, optimizer, [make_allocator(model).attach(optimizer) for model in models]

    models, optimizer, allocators = attach_both()
    for number in range(1, 8):
        optimizer.zero_grad()
        sum(mlp.run(model, mlp.inputs(number)).square().sum() for model in models).backward()
        optimizer.step()
    _, resumed_optimizer, resumed = attach_both()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert allocators[0].budgets != allocators[1].budgets
    for allocator, other in zip(allocators, resumed, strict=True):
        assert (other.step, other.budgets, other.history) == (7, allocator.budgets, allocator.history)


def test_models_with_different_settings_need_an_allocator_each(mlp):
    models = nn.ModuleList([mlp.adapted(), mlp.adapted(target_sparsity=0.9)])
    with pytest.raises(ValueError, match=r"target_sparsity must be the same in all PEFT models .*, got 0.7 and 0.9"):
        make_allocator(models)
    single, double = make_allocator(mlp.adapted()), make_allocator(nn.ModuleList([mlp.adapted(), mlp.adapted()]))
    assert [matrix.size for matrix in double.matrices] == 2 * [matrix.size for matrix in single.matrices]


def test_a_second_allocator_of_an_adapter_replaces_the_state_of_the_first(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    newest = make_allocator(model).attach(optimizer)
    newest.advance_to(3)
    assert optimizer.state_dict()["param_groups"][0]["snella_allocator"]["step"] == 3


def test_optimizer_checkpoint_without_allocator_loads(mlp):
    model = mlp.adapted()
    state = make_optimizer(model).state_dict()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    optimizer.load_state_dict(state)
    assert allocator.step == 0


def test_state_with_another_format_raises(mlp):
    with pytest.raises(ValueError, match="the allocator's state must have format 2, got 1"):
        make_allocator(mlp.adapted()).load_state_dict({"format": 1})
    with pytest.raises(ValueError, match="must have format 2, got None"):
        make_allocator(mlp.adapted()).load_state_dict({})
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    state = optimizer.state_dict()
    state["param_groups"][0]["snella_allocator"] |= {"format": 1, "history": []}
    with pytest.raises(ValueError, match="must have format 2, got 1"):
        optimizer.load_state_dict(state)


def test_state_of_another_model_raises_with_a_name(mlp):
    state = make_allocator(mlp.adapted(target_modules=["lin1"])).state_dict()
    with pytest.raises(ValueError, match=r"state and this model have different matrices, e\.g\. \['lin0'\]"):
        make_allocator(mlp.adapted()).load_state_dict(state)


@pytest.mark.parametrize("changes", [{"r": 2}, {"importance": "magnitude"}, {"importance": "delta_magnitude"}], ids=str)
def test_state_with_another_rank_or_metric_raises_without_changes(mlp, changes):
    allocator = make_allocator(mlp.adapted(r=4))
    allocator.importance.update()
    allocator.advance_to(1)
    state, other = allocator.state_dict(), make_allocator(mlp.adapted(**{"r": 4, **changes}))
    expected = "averages of importance='sensitivity'" if "importance" in changes else r"shape \[10, 4\] for 'lin0/A'"
    with pytest.raises(ValueError, match=f"{expected}, but the model needs"):
        other.load_state_dict(state)
    assert other.step == 0


# wrapped optimizers -------------------------------------------------------------------------------------------------


def test_accelerate_optimizer_is_supported(mlp):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # process-wide state, which Trainers in other tests also set
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = mlp.adapted()
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        allocator = make_allocator(model).attach(optimizer)
        model.train()
        for number in range(1, 2 * EPOCHS * STEPS + 1):
            with accelerator.accumulate(model):
                accelerator.backward(mlp.run(model, mlp.inputs(number)).square().sum())
                optimizer.step()
                optimizer.zero_grad()
        assert allocator.step == EPOCHS * STEPS
        assert sum(allocator.budgets.values()) == allocator.target_budget
        assert "snella_allocator" in optimizer.state_dict()["param_groups"][0]
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_overflow_in_fused_optimizer_leaves_importance_finite(mlp):
    torch.manual_seed(0)
    model = mlp.adapted().train()
    optimizer = make_optimizer(model, fused=True)
    allocator = make_allocator(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(1, EPOCHS * STEPS + 1):
        loss = mlp.run(model, mlp.inputs(number)).square().sum()
        scaler.scale(loss * (math.inf if number == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    scores = list(allocator.history[-1]["importance"].values())
    assert all(0 < score < math.inf for score in scores)
    assert len({matrix.budget / matrix.size for matrix in allocator.matrices}) > 1


@pytest.mark.parametrize("zero_init_ema", [False, True])  # before and after the optimizer step
def test_importance_does_not_depend_on_gradient_scale(zero_init_ema, mlp):
    scores = {}
    for scale in (1.0, 1024.0):
        model = mlp.adapted(zero_init_ema=zero_init_ema).train()
        optimizer = make_optimizer(model, fused=True)
        allocator = make_allocator(model).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        for number in (1, 2, 3):
            scaler.scale(mlp.run(model, mlp.inputs(number)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scores[scale] = list(allocator.history[-1]["importance"].values())
    assert scores[1024.0] == pytest.approx(scores[1.0], rel=1e-3)


def test_infinite_gradient_entry_does_not_freeze_its_matrix(mlp):
    model = mlp.adapted().train()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    for number in range(1, STEPS + 1):
        mlp.run(model, mlp.inputs(number)).square().sum().backward()
        if number == 2:
            allocator.matrices[0].layer.snella_A["default"].grad[0, 0, 0] = math.inf
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()
    assert all(0 < score < math.inf for score in allocator.history[-1]["importance"].values())


def test_optimizer_without_factors_raises(mlp):
    model = mlp.adapted()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="SGD has none of the factors of adapter 'default'; create the optimizer"):
        make_allocator(model).attach(other)


def scaled_step(mlp, model, optimizer, scaler, broken):
    scaler.scale(mlp.run(model).square().sum()).backward()
    if broken:
        optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clears", ["before", "after", "zeros"])
def test_skipped_steps_count_towards_the_target(mlp, clears):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.train()
    for number in range(1, EPOCHS * STEPS + 1):
        if clears == "before":
            optimizer.zero_grad()
        scaled_step(mlp, model, optimizer, scaler, number in (1, 2, 6))
        if clears != "before":
            optimizer.zero_grad(set_to_none=clears == "after")
        if number == STEPS:
            assert allocator.history[-1]["step"] == STEPS
    assert allocator.step == EPOCHS * STEPS
    assert sum(allocator.budgets.values()) == allocator.target_budget
    assert all(torch.isfinite(torch.tensor(allocator.importance.scores())))


def test_uncounted_skipped_steps_warn_when_saving(mlp, tmp_path):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model, total_epochs=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model.train()
    for number in range(1, STEPS + 1):
        optimizer.zero_grad()
        scaled_step(mlp, model, optimizer, scaler, number == STEPS)
    with pytest.warns(UserWarning, match=r"counted 2 of 3 optimizer steps; .*allocator\.advance_to\(3\) reduces"):
        model.save_pretrained(tmp_path)
    allocator.advance_to(3)
    assert sum(allocator.budgets.values()) == allocator.target_budget


def test_zero_grad_without_step_counts_only_after_overflow(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        mlp.run(model).square().sum().backward()
    assert allocator.step == 0


def test_detach_restores_zero_grad(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    outer = optimizer.zero_grad
    assert "set_to_none" in inspect.signature(outer).parameters
    allocator.detach()
    assert "zero_grad" not in optimizer.__dict__
    allocator.attach(optimizer)
    optimizer.zero_grad = lambda: outer()  # wrapped by a library
    allocator.detach()
    mlp.run(model.train()).square().sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("passes", ["positional", "keyword"])
@pytest.mark.parametrize("preset", ["paper", "official", "matched"])
def test_closure_steps_equal_plain_steps(mlp, preset, passes):
    settings = {"preset": preset, "update_dropout": 0.0, "update_drop_path": 0.0}
    plain, other = mlp.adapted(**settings), mlp.adapted(**settings)
    optimizer = make_optimizer(plain)
    reference = make_allocator(plain).attach(optimizer)
    train(mlp, plain, optimizer)
    optimizer = make_optimizer(other)
    allocator = make_allocator(other).attach(optimizer)
    other.train()
    for number in range(1, EPOCHS * STEPS + 1):

        def closure(number=number):
            optimizer.zero_grad()
            loss = mlp.run(other, mlp.inputs(number)).square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure) if passes == "positional" else optimizer.step(closure=closure)
        assert loss.item() > 0
    assert allocator.history == reference.history
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_importance_uses_the_first_closure_call(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=1e-3, max_iter=3)
    allocator = make_allocator(model, total_epochs=1, steps_per_epoch=1).attach(optimizer)
    mlp.run(model.train()).square().sum().backward()
    by_hand = ImportanceTracker(adapted_matrices(model))
    by_hand.update()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = mlp.run(model).square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    expected = by_hand.state_dict()["averages"]
    assert all(
        torch.equal(value, expected[key]) for key, value in allocator.importance.state_dict()["averages"].items()
    )


@pytest.mark.parametrize("count", [2, 3])
def test_zero_grad_hooks_are_chained(count):
    optimizer, calls = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), []
    hooks = [_ZeroGradHook(optimizer, lambda _, number=number: calls.append(number)) for number in range(count)]
    optimizer.zero_grad()
    assert sorted(calls) == list(range(count))
    for number, hook in reversed(list(enumerate(hooks))):
        hook.remove()
        calls.clear()
        optimizer.zero_grad()
        assert sorted(calls) == list(range(number))
    assert "zero_grad" not in optimizer.__dict__


def test_overflow_inside_closure_is_not_a_skipped_step(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=3)
    allocator = make_allocator(model).attach(optimizer)
    model.train()

    def closure():
        optimizer.zero_grad()
        loss = mlp.run(model).square().sum()
        loss.backward()
        allocator.matrices[0].layer.snella_A["default"].grad.fill_(torch.inf)
        return loss

    optimizer.step(closure)
    assert allocator.step == 1


# errors and warnings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_epochs": 0}, "total_epochs must be an integer of at least 1, got 0"),
        ({"steps_per_epoch": -3}, "steps_per_epoch must be an integer of at least 1, got -3"),
        ({"steps_per_epoch": 50 / 16}, "steps_per_epoch must be an integer of at least 1, got 3.125"),
        ({"steps_per_epoch": "2"}, "steps_per_epoch must be an integer of at least 1, got '2'"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"adapter_name": "nobody"}, r"adapter_name must be one of \['default'\], got 'nobody'"),
    ],
)
def test_arguments_out_of_range_raise(mlp, settings, message):
    with pytest.raises(ValueError, match=message):
        make_allocator(mlp.adapted(), **settings)


def test_attaching_twice_raises(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model).attach(optimizer)
    with pytest.raises(RuntimeError, match=r"already attached to an optimizer; call detach\(\) first"):
        allocator.attach(optimizer)


def test_matrices_without_gradient_are_listed_in_one_warning(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    model.base_model.model.lin0.register_forward_hook(lambda module, args, output: output.detach())
    model.train()
    message = "1 of 2 adapted matrices got no gradient in the first 5 steps: 'lin0'; the loss does not depend on"
    with pytest.warns(UserWarning, match=message) as records:
        train(mlp, model, optimizer)
    assert len(records) == 1


def test_missing_gradients_of_all_matrices_suggest_a_lower_scaling(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    model.base_model.model.lin1.register_forward_hook(lambda module, args, output: output * 0)  # saturated
    model.train()
    message = "2 of 2 adapted matrices got no gradient in the first 5 steps: .*; the initial update may saturate"
    with pytest.warns(UserWarning, match=message):
        train(mlp, model, optimizer)


@pytest.mark.parametrize(
    ("prepare", "remedy"),
    [
        (lambda model: model.merge_adapter(), r"the adapter is merged; call unmerge_adapter\(\) before training"),
        (lambda model: model.base_model.requires_grad_(False), "the factors are frozen; load .* is_trainable=True"),
        (lambda model: model.base_model.set_adapter("other"), r"adapter is not active; call set_adapter\('default'\)"),
    ],
)
def test_missing_gradients_of_unused_adapters_name_the_reason(mlp, prepare, remedy):
    model = mlp.adapted()
    model.add_adapter("other", mlp.config())
    optimizer = make_optimizer(model)
    allocator = make_allocator(model)
    prepare(model)
    allocator.importance.update = lambda *_: None
    allocator.importance.names_with_gradient = set
    for matrix in allocator.matrices:
        matrix.layer.is_applied = True
    for _ in range(4):
        allocator._update_importance()
    with pytest.warns(UserWarning, match=f"2 of 2 adapted matrices got no gradient in the first 5 steps: .*{remedy}"):
        allocator._update_importance()
    assert optimizer is not None


def test_optimizer_without_hooks_raises(mlp):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.param_groups, self.state = inner.param_groups, inner.state

    model = mlp.adapted()
    optimizer = make_optimizer(model)
    wrapper, partial_wrapper = Lookahead(optimizer), Lookahead(optimizer)
    partial_wrapper._optimizer_step_pre_hooks = partial_wrapper._optimizer_step_post_hooks = {}  # as in timm
    for lookahead in (wrapper, partial_wrapper):
        with pytest.raises(TypeError, match="Lookahead lacks hooks of torch's optimizers; attach to the"):
            make_allocator(model).attach(lookahead)


def test_attaching_detaches_an_earlier_allocator_of_the_adapter(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    first = make_allocator(model).attach(optimizer)
    second = make_allocator(model, steps_per_epoch=1).attach(optimizer)
    train(mlp, model, optimizer, last=2)
    assert (first.step, second.step) == (0, 2)
    assert sum(second.budgets.values()) == second.history[-1]["budget"] < first.history[-1]["budget"]
    first.attach(make_optimizer(model))  # another optimizer
    assert len(second._handles) > 0


@pytest.mark.parametrize("factor", ["snella_A", "snella_B"])
def test_allocator_attaches_to_an_optimizer_of_one_factor(mlp, factor):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if factor in name], lr=0.1)
    make_allocator(model).attach(optimizer)


def test_gradients_of_none_suggest_checkpointing_without_reentry(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    model.base_model.model.lin1.register_forward_hook(
        lambda module, args, output: output.detach() + torch.zeros((), requires_grad=True)
    )
    model.train()
    with pytest.warns(UserWarning, match=r"2 of 2 adapted .* their gradients are None: .*use_reentrant=False"):
        train(mlp, model, optimizer)


def test_two_step_training_lists_matrices_without_gradient(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model, total_epochs=1, steps_per_epoch=2).attach(optimizer)
    # a zero gradient, e.g. of a masked output
    model.base_model.model.lin0.register_forward_hook(lambda module, args, output: output * 0)
    model.train()
    with pytest.warns(UserWarning, match="1 of 2 adapted matrices got no gradient in the first 2 steps: 'lin0'"):
        train(mlp, model, optimizer, last=2)


def test_matrices_frozen_for_lack_of_a_gradient_are_listed(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    allocator = make_allocator(model, total_epochs=6, steps_per_epoch=1).attach(optimizer)
    model.base_model.model.lin0.register_forward_hook(lambda module, args, output: output.detach())
    model.train()
    train(mlp, model, optimizer, last=4)
    assert allocator.frozen == ["lin0"]
    with pytest.warns(UserWarning, match="1 of 2 adapted matrices got no gradient in the first 5 steps: 'lin0'"):
        train(mlp, model, optimizer, first=5, last=6)


def test_late_gradients_and_frozen_matrices_do_not_warn(mlp):
    model = mlp.adapted()
    optimizer = make_optimizer(model)
    make_allocator(model).attach(optimizer)
    lin0 = model.base_model.model.lin0
    handle = lin0.register_forward_hook(lambda module, args, output: output.detach())
    train(mlp, model, optimizer, last=4)  # like a zero-initialized head
    handle.remove()
    train(mlp, model, optimizer, first=5)
    empty = mlp.adapted()
    optimizer = make_optimizer(empty)
    allocator = make_allocator(empty).attach(optimizer)
    allocator._set_budgets([0, 50])
    train(mlp, empty, optimizer, last=2)
    allocator._set_budgets([0, 50])
    train(mlp, empty, optimizer, first=3)


# SNELL --------------------------------------------------------------------------------------------------------------


def test_snell_configuration_reaches_its_target(vit):
    model = vit.adapted(kernel="p_linear", allocation="uniform", target_sparsity=0.9)
    optimizer = make_optimizer(model)
    allocator = make_allocator(model, total_epochs=1, steps_per_epoch=2).attach(optimizer)
    train(vit, model, optimizer, last=2)
    assert all(m.budget / m.size == pytest.approx(0.1, abs=0.001) for m in allocator.matrices)
    assert all(m.nonzeros() == m.budget for m in allocator.matrices)


@pytest.mark.parametrize(
    ("every", "end", "reached_at"), [("epoch", 0.5, 6), ("epoch", 0.6, 9), (2, 0.5, 6), (4, 0.3, 4), ("epoch", 1.0, 12)]
)
def test_budget_reaches_target_at_schedule_end_and_stays(mlp, every, end, reached_at):
    model = mlp.adapted(schedule_end=end, realloc_every=every)
    optimizer = make_optimizer(model)
    allocator = BudgetAllocator(model, total_epochs=4, steps_per_epoch=3).attach(optimizer)
    assert not allocator.has_reached_target
    train(mlp, model, optimizer, last=12)
    at_target = [entry["step"] for entry in allocator.history if entry["budget"] == allocator.target_budget]
    assert at_target == [entry["step"] for entry in allocator.history if entry["step"] >= reached_at]
    assert allocator.history[-1]["t"] == (4 if every == "epoch" else 12)
    assert allocator.has_reached_target


def test_match_update_without_step_matcher_warns(mlp):
    model = mlp.adapted(preset="matched")
    with pytest.warns(UserWarning, match="match_update=True has no effect on this AdamW; create the optimizer"):
        make_allocator(model).attach(torch.optim.AdamW(model.parameters()))
    make_allocator(model).attach(create_snella_optimizer(model, lr=0.1))

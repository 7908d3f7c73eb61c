"""Parameter groups and step matching of `create_snella_optimizer`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from snella import create_snella_optimizer
from snella.matrices import adapted_matrices
from snella.optimizer import StepMatcher


def make_groups(model, **settings):
    optimizer = create_snella_optimizer(model, **{"lr": 0.1} | settings)
    return {group["name"]: group for group in optimizer.param_groups}


def parameter_names(model, group):
    group_ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in group_ids}


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("name", ["lr", "scalar_lr", "head_lr", "weight_decay", "head_weight_decay"])
def test_negative_rates_raise(mlp, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got {value}$"):
        create_snella_optimizer(mlp.adapted(), **{"lr": 0.1, name: value})


def test_parameter_groups_have_their_lr_and_weight_decay(vit):
    model = vit.adapted(modules_to_save=["head", "norm"], learn_temperature=True)
    groups = make_groups(
        model, lr=0.1, scalar_lr=0.01, head_lr=0.3, weight_decay=0.4, head_weight_decay=0.5, betas=(0.8, 0.9)
    )
    assert list(groups) == ["factors", "scalars", "head", "head_no_decay"]
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "factors": (0.1, 0.4),
        "scalars": (0.01, 0.0),
        "head": (0.3, 0.5),
        "head_no_decay": (0.3, 0.0),
    }
    assert all(group["betas"] == (0.8, 0.9) for group in groups.values())
    kinds = {name: {n.split(".")[-2] for n in parameter_names(model, group)} for name, group in groups.items()}
    assert kinds["factors"] == {"snella_A", "snella_B"}
    assert kinds["scalars"] == {"snella_piece_coeff", "snella_alpha", "snella_beta", "snella_temperature"}
    assert {n.rpartition(".")[2] for n in parameter_names(model, groups["head"])} == {"weight"}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    assert {id(p) for g in groups.values() for p in g["params"]} == {id(p) for p in trained}


def test_head_lr_without_trainable_head_warns(vit):
    with pytest.warns(UserWarning, match=r"head_lr=0\.5 has no effect: PeftModel trains only the adapter"):
        make_groups(vit.adapted(), head_lr=0.5)


def test_head_defaults_to_the_settings_of_the_factors(vit):
    groups = make_groups(vit.adapted(modules_to_save=["head"]), lr=0.2, weight_decay=0.1)
    assert (groups["head"]["lr"], groups["head"]["weight_decay"]) == (0.2, 0.1)
    assert groups["scalars"]["lr"] == 1e-4


def test_default_optimizer_is_adamw_and_can_be_changed(mlp):
    assert type(create_snella_optimizer(mlp.adapted(), lr=0.1)) is torch.optim.AdamW
    optimizer = create_snella_optimizer(mlp.adapted(), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_empty_groups_are_omitted(mlp):
    assert list(make_groups(mlp.adapted(kernel="linear"))) == ["factors"]


def test_only_active_adapter_is_optimized(mlp):
    model = mlp.adapted()
    model.add_adapter("second", mlp.config(r=2))
    model.set_adapter("second")
    assert all(name.endswith(".second") for g in make_groups(model).values() for name in parameter_names(model, g))


def test_frozen_piece_coefficients_are_omitted(mlp):
    model = mlp.adapted(learn_piece_coeff=False)
    assert not [name for name in parameter_names(model, make_groups(model)["scalars"]) if "piece_coeff" in name]


def test_parameters_of_other_methods_form_the_head_groups(mlp):
    model = get_peft_model(mlp.base(), LoraConfig(r=2, target_modules=["lin0"]))
    assert list(make_groups(model)) == ["head"]


def test_model_without_trainable_parameters_raises(mlp):
    base = mlp.base().requires_grad_(False)
    with pytest.raises(ValueError, match="MLP has no trainable parameter; wrap it with get_peft_model"):
        create_snella_optimizer(base, lr=0.1)


def take_step(model, optimizer):
    """Take one step on a batch of ones."""
    optimizer.zero_grad()
    model(torch.ones(4, 10)).square().sum().backward()
    optimizer.step()


def relative_changes(model, before):
    """Return rms(change of scaling·S) / rms(W0) of every matrix."""
    changes = []
    for matrix, old in zip(adapted_matrices(model), before, strict=True):
        layer = matrix.layer
        weight = layer.get_base_layer().weight[layer.matrix_rows("default")[matrix.group]]
        changed = layer.scaling["default"] * (matrix.sparse_update() - old)
        changes.append(float((changed.square().mean() / weight.square().mean()).sqrt()))
    return changes


@pytest.mark.parametrize("scaling", [1.0, 30.0])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_matched_steps_are_proportional_to_weight_for_every_size_and_scaling(vit, scaling, size):
    torch.manual_seed(0)
    model = vit.adapted(scaling=scaling, match_update=True, target_sparsity=0.0)
    with torch.no_grad():
        for matrix in adapted_matrices(model):
            if matrix.group == 0:
                matrix.layer.get_base_layer().weight.mul_(size)
    optimizer = create_snella_optimizer(model, lr=1e-3, scalar_lr=0.0)
    for _ in range(4):
        before = [matrix.sparse_update() for matrix in adapted_matrices(model)]
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        assert all(0.2e-3 < change < 3e-3 for change in relative_changes(model, before))


def test_unmatched_steps_depend_on_scaling_and_size_of_weights(vit):
    torch.manual_seed(0)
    changes = []
    for scaling in (1.0, 30.0):
        model = vit.adapted(scaling=scaling, target_sparsity=0.0)
        optimizer = create_snella_optimizer(model, lr=1e-3, scalar_lr=0.0)
        before = [matrix.sparse_update() for matrix in adapted_matrices(model)]
        model(torch.ones(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        changes.append(sum(relative_changes(model, before)))
    assert changes[1] > 10 * changes[0]


def test_step_scale_equals_formula(mlp):
    model = mlp.adapted(scaling=3.0, target_sparsity=0.0, init_weights=False)
    matrix = adapted_matrices(model)[0]
    layer, (A, B) = matrix.layer, (part.detach().clone() for part in matrix.factors)
    slope = 2 * matrix.sparse_update().abs().mean().sqrt()
    change = 0.02 * layer.get_base_layer().weight.square().mean().sqrt() / 3.0
    delta = 2 * change / (slope + (slope**2 + 4 * change).sqrt())
    scale = delta / (0.02 * 0.1 * math.sqrt(layer.snella_config["default"].r))
    plain = copy.deepcopy(model)
    steps = []
    for candidate, matched in ((model, True), (plain, False)):
        optimizer = create_snella_optimizer(candidate, torch.optim.SGD, lr=0.02, match_update=matched)
        take_step(candidate, optimizer)
        steps.append(
            [part.detach() - old for part, old in zip(adapted_matrices(candidate)[0].factors, (A, B), strict=True)]
        )
    for matched, unmatched in zip(*steps, strict=True):
        assert unmatched.abs().max() > 0
        torch.testing.assert_close(matched, float(scale) * unmatched, rtol=1e-4, atol=1e-7)


def test_step_scale_depends_on_rank_of_layer(mlp):
    matched = {}
    for rank in (2, 8):
        torch.manual_seed(0)
        model = mlp.adapted(preset="matched", r=4, rank_pattern={"lin0": rank}, target_sparsity=0.0)
        optimizer = create_snella_optimizer(model, lr=0.02)
        layer = adapted_matrices(model)[0].layer
        slope = 2 * float(layer.sparse_updates("default")[0].abs().mean().sqrt())
        take_step(model, optimizer)
        change = 0.02 * float(layer.get_base_layer().weight.square().mean().sqrt()) / layer.scaling["default"]
        delta = 2 * change / (slope + math.sqrt(slope**2 + 4 * change))
        matched[rank] = optimizer.snella_step_matcher.scales[model.base_model.model.lin0, "default"][0]
        assert matched[rank] == pytest.approx(delta / (0.02 * 0.1 * math.sqrt(rank)), rel=1e-4)
    assert matched[2] != matched[8]


def test_resumed_optimizer_takes_the_same_matched_steps(mlp):
    torch.manual_seed(0)
    model = mlp.adapted(match_update=True, target_sparsity=0.0)
    optimizer = create_snella_optimizer(model, lr=0.01)
    for _ in range(3):
        take_step(model, optimizer)
    resumed = copy.deepcopy(model)
    restored = create_snella_optimizer(resumed, lr=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for candidate, candidate_optimizer in ((model, optimizer), (resumed, restored)):
        for _ in range(4):
            take_step(candidate, candidate_optimizer)
    for value, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other)


def test_state_of_other_layers_raises(mlp):
    matcher = StepMatcher(mlp.adapted())
    optimizer = create_snella_optimizer(mlp.adapted(), lr=0.1)
    optimizer.param_groups[0]["snella_step_matcher"] = {"step": 5, "slopes": [[1.0], [1.0], [1.0]]}
    with pytest.raises(ValueError, match=r"has \[1, 1, 1\] adapted matrices per layer, but the model has \[1, 1\]"):
        matcher.attach(optimizer)
    assert not hasattr(optimizer, "snella_step_matcher") and "snella_step_matcher" in optimizer.param_groups[0]


def test_config_enables_step_matching(mlp):
    def hooks(optimizer):
        return len(optimizer._optimizer_step_post_hooks)

    plain = hooks(create_snella_optimizer(mlp.adapted(), lr=0.1))
    assert hooks(create_snella_optimizer(mlp.adapted(preset="matched"), lr=0.1)) == plain + 1
    assert hooks(create_snella_optimizer(mlp.adapted(), lr=0.1, match_update=True)) == plain + 1
    assert hooks(create_snella_optimizer(mlp.adapted(preset="matched"), lr=0.1, match_update=False)) == plain


def test_only_adapters_with_match_update_are_matched(mlp):
    model = mlp.adapted(preset="matched")
    model.add_adapter("plain", mlp.config(kernel="rbf"))
    model.base_model.set_adapter(["default", "plain"])
    optimizer = create_snella_optimizer(model, lr=0.1)
    take_step(model, optimizer)
    assert {name for _, name in optimizer.snella_step_matcher.scales} == {"default"}
    with pytest.raises(ValueError, match="match_update requires a kernel in"):
        create_snella_optimizer(model, lr=0.1, match_update=True)


def test_step_matching_raises_for_other_kernels(mlp):
    with pytest.raises(ValueError, match=r"match_update requires a kernel in \['mix_k', 'p_linear'\], got 'rbf'"):
        create_snella_optimizer(mlp.adapted(kernel="rbf"), lr=0.1, match_update=True)
    with pytest.raises(ValueError, match="match_update requires trainable SNELLA factors, but MLP has none"):
        StepMatcher(mlp.base())
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        StepMatcher(mlp.adapted(), interval=0)


def test_zero_budget_and_zero_lr_change_nothing(mlp):
    model = mlp.adapted(match_update=True, target_sparsity=0.0)
    layer = adapted_matrices(model)[0].layer
    layer.set_budget("default", [0])
    optimizer = create_snella_optimizer(model, lr=0.0, scalar_lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.01
    take_step(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_matching_gathers_sharded_weights_and_rejects_sharded_factors(mlp):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp.adapted(match_update=True, target_sparsity=0.0)
    expected = StepMatcher(model)._weight_rms
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.requires_grad})
        assert StepMatcher(model)._weight_rms == expected
        sharded = fully_shard(mlp.adapted(match_update=True, target_sparsity=0.0), mesh=mesh)
        with pytest.raises(NotImplementedError, match=r"requires unsharded factors.*sharded by FSDP"):
            create_snella_optimizer(sharded, lr=0.1)
    finally:
        torch.distributed.destroy_process_group()


def test_steps_of_two_models_with_equal_names_are_scaled_separately(mlp):
    torch.manual_seed(0)
    towers = nn.ModuleDict({name: mlp.adapted(preset="matched", target_sparsity=0.0) for name in ("a", "b")})
    with torch.no_grad():
        for matrix in adapted_matrices(towers["b"]):
            matrix.layer.get_base_layer().weight.mul_(3)
    optimizer = create_snella_optimizer(towers, lr=0.02)
    sum(mlp.run(tower).square().sum() for tower in towers.values()).backward()
    optimizer.step()
    scales = optimizer.snella_step_matcher.scales
    a, b = (scales[towers[name].base_model.model.lin0, "default"][0] for name in ("a", "b"))
    assert b > 2 * a

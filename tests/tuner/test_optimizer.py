"""Parameter groups: who gets which rate and decay."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from snella import create_snella_optimizer


def groups_of(model, **settings):
    optimizer = create_snella_optimizer(model, **{"lr": 0.1} | settings)
    return {group["name"]: group for group in optimizer.param_groups}


def names_of(model, group):
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_every_kind_of_parameter_has_its_group_rate_and_decay(vit):
    model = vit.adapted(modules_to_save=["head", "norm"], learn_temperature=True)
    groups = groups_of(
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
    kinds = {name: {n.split(".")[-2] for n in names_of(model, group)} for name, group in groups.items()}
    assert kinds["factors"] == {"snella_A", "snella_B"}
    assert kinds["scalars"] == {"snella_piece_coeff", "snella_alpha", "snella_beta", "snella_temperature"}
    assert {n.rpartition(".")[2] for n in names_of(model, groups["head"])} == {"weight"}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    assert {id(p) for g in groups.values() for p in g["params"]} == {id(p) for p in trained}


def test_defaults_follow_the_factors(vit):
    groups = groups_of(vit.adapted(modules_to_save=["head"]), lr=0.2, weight_decay=0.1)
    assert (groups["head"]["lr"], groups["head"]["weight_decay"]) == (0.2, 0.1)
    assert groups["scalars"]["lr"] == 1e-4


def test_the_default_optimiser_is_adamw_and_any_other_can_be_named(mlp):
    assert type(create_snella_optimizer(mlp.adapted(), lr=0.1)) is torch.optim.AdamW
    optimizer = create_snella_optimizer(mlp.adapted(), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_groups_without_parameters_are_left_out(mlp):
    assert list(groups_of(mlp.adapted(kernel="linear"))) == ["factors"]


def test_only_the_active_adapter_is_trained(mlp):
    model = mlp.adapted()
    model.add_adapter("second", mlp.config(r=2))
    model.set_adapter("second")
    assert all(name.endswith(".second") for g in groups_of(model).values() for name in names_of(model, g))


def test_frozen_piece_coefficients_are_left_out(mlp):
    model = mlp.adapted(learn_piece_coeff=False)
    assert not [name for name in names_of(model, groups_of(model)["scalars"]) if "piece_coeff" in name]


def test_another_methods_parameters_form_the_head_groups(mlp):
    model = get_peft_model(mlp.base(), LoraConfig(r=2, target_modules=["lin0"]))
    assert list(groups_of(model)) == ["head"]


def test_a_model_with_nothing_to_train_is_refused(mlp):
    base = mlp.base().requires_grad_(False)
    with pytest.raises(ValueError, match="MLP has no trainable parameter; wrap it with get_peft_model"):
        create_snella_optimizer(base, lr=0.1)

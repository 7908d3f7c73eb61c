"""`adapted_matrices`: names, types, depths and budgets."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from snella import SnellaConfig
from snella.matrices import adapted_matrices


def test_matrices_have_names_kinds_and_shapes(vit):
    matrices = adapted_matrices(vit.adapted())[:6]
    assert [m.name for m in matrices] == [
        "blocks.0.attn.qkv.q",
        "blocks.0.attn.qkv.k",
        "blocks.0.attn.qkv.v",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]
    assert [m.kind for m in matrices] == ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert {m.module_name for m in matrices[:3]} == {"blocks.0.attn.qkv"}
    assert [m.shape for m in matrices] == [(64, 64)] * 4 + [(192, 64), (64, 192)]
    assert matrices[4].size == 192 * 64


def test_depth_counts_blocks_of_all_stages(cases):
    depths = {m.name.split(".mlp")[0]: m.depth for m in adapted_matrices(cases["timm_convnext"].adapted())}
    assert list(depths.values()) == [0, 1, 2, 3]


def test_matrix_outside_blocks_has_no_depth(mlp):
    assert [(m.kind, m.depth) for m in adapted_matrices(mlp.adapted())] == [("lin0", None), ("lin1", None)]


def test_matrices_of_other_splits_are_numbered(vit):
    model = vit.adapted(target_modules=["blocks.0.attn.qkv"], qkv_groups=2)
    assert [(m.name, m.kind) for m in adapted_matrices(model)] == [
        ("blocks.0.attn.qkv.0", "attn.0"),
        ("blocks.0.attn.qkv.1", "attn.1"),
    ]


def test_budget_and_nonzeros_agree(mlp):
    matrix = adapted_matrices(mlp.adapted())[0]
    matrix.layer.set_budget("default", [30])
    assert (matrix.budget, matrix.is_frozen, matrix.nonzeros()) == (30, False, 30)
    matrix.layer.set_budget("default", [0])
    assert (matrix.budget, matrix.is_frozen, matrix.nonzeros()) == (0, True, 0)


def test_frozen_matrix_of_fused_layer_does_not_freeze_others(vit):
    model = vit.adapted(target_modules=["blocks.0.attn.qkv"])
    matrices = adapted_matrices(model)
    matrices[0].layer.set_budget("default", [0, 10, 20])
    assert [m.nonzeros() for m in matrices] == [0, 10, 20]
    vit.run(model.train()).square().sum().backward()
    gradients = [m.slice_factors(m.layer.snella_A["default"].grad, m.layer.snella_B["default"].grad) for m in matrices]
    assert [bool(A.any() and B.any()) for A, B in gradients] == [False, True, True]


@pytest.mark.parametrize(
    "wrap", [lambda m: m.base_model, lambda m: m.base_model.model, nn.DataParallel], ids=["tuner", "model", "parallel"]
)
def test_names_do_not_depend_on_wrappers(mlp, wrap):
    model = mlp.adapted()
    assert [m.name for m in adapted_matrices(wrap(model))] == ["lin0", "lin1"]


@pytest.mark.parametrize("is_first", [False, True])
def test_submodule_named_like_a_wrapper_keeps_its_matrices(is_first):
    modules = [("lin", nn.Linear(4, 4)), ("module", nn.ModuleDict({"lin": nn.Linear(4, 4)}))]
    names = ["lin", "base_model.model.module.lin"]
    if is_first:
        modules.reverse()
        names.reverse()
    adapted = get_peft_model(nn.ModuleDict(modules), SnellaConfig(r=2, target_modules=["lin"]))
    assert [m.name for m in adapted_matrices(adapted)] == names


def test_layers_with_names_of_wrappers_have_the_depth_of_their_block():
    def block():
        return nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(4, 4)})])

    model = nn.ModuleDict({"blocks": block(), "module": nn.ModuleDict({"blocks": block()})})
    adapted = get_peft_model(model, SnellaConfig(r=2, target_modules=["lin"]))
    assert [(m.name, m.kind, m.depth) for m in adapted_matrices(adapted)] == [
        ("blocks.0.lin", "lin", 0),
        ("base_model.model.module.blocks.0.lin", "lin", 0),
    ]


def test_names_do_not_depend_on_compilation(mlp):
    model = mlp.adapted()
    model.base_model.model.lin0 = torch.compile(model.base_model.model.lin0, backend="eager")
    assert [m.name for m in adapted_matrices(torch.compile(model, backend="eager"))] == ["lin0", "lin1"]


# dynamo reads every tensor's gradient at a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_model_equals_plain_model(mlp):
    model = mlp.adapted().train()
    compiled = torch.compile(model, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        mlp.run(run).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    model.eval()
    for budget in (120, 7):
        adapted_matrices(compiled)[0].layer.set_budget("default", [budget])
        assert torch.allclose(mlp.predict(compiled), mlp.predict(model), atol=1e-6)


def test_model_without_adapters_raises(mlp):
    with pytest.raises(ValueError, match="MLP has no SNELLA layer; wrap it with get_peft_model"):
        adapted_matrices(mlp.base())


def test_unknown_adapter_error_lists_adapters(mlp):
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'mine'"):
        adapted_matrices(mlp.adapted(), "mine")


def test_model_with_deleted_adapters_raises(mlp):
    model = mlp.adapted()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"adapter_name must be one of \[\], got 'default'"):
        adapted_matrices(model)


def test_block_index_does_not_depend_on_targets(cases):
    model = cases["timm_vit"].adapted(exclude_modules=r"blocks\.[0-3]\..*")
    assert {m.depth for m in adapted_matrices(model)} == {4, 5}


def test_names_do_not_contain_checkpoint_wrappers():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, SnellaConfig(r=2, target_modules=["0", "1"]))
    base = model.get_base_model()
    base[0] = checkpoint_wrapper(base[0])
    assert [matrix.name for matrix in adapted_matrices(model)] == ["0", "1"]

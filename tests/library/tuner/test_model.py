"""PEFT's contract for every kind of model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from snella import SnellaConfig, SnellaModel
from snella.layer import SnellaLayer
from snella.matrices import adapted_matrices


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(state, expected):
    assert list(state) == list(expected)
    mismatched = [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])]
    assert not mismatched


def layers(model):
    return [module for module in model.modules() if isinstance(module, SnellaLayer)]


# every model --------------------------------------------------------------------------------------------------------


def test_update_changes_output_and_only_adapter_is_trained(case):
    base = case.base()
    before = case.predict(base)
    model = get_peft_model(base, case.config())
    assert len(adapted_matrices(model)) == case.num_matrices
    assert not torch.allclose(case.predict(model.eval()), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".snella_" in name for name in trained)


def test_all_factors_and_scalars_have_gradients(case):
    model = case.adapted().train()
    case.run(model).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".snella_" in name), name
        if "snella_A" in name or "snella_B" in name:
            assert parameter.grad.abs().sum() > 0, name


def test_saved_adapter_is_bit_identical_under_another_name(case, tmp_path):
    model = case.adapted(modules_to_save=case.head)
    for matrix in adapted_matrices(model):
        if matrix.group == 0:
            matrix.layer.set_budget("default", [size // 3 for size in _group_sizes(matrix)])
    expected = case.predict(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, adapter_name="other").eval()
    assert torch.equal(case.predict(loaded), expected)
    assert [m.budget for m in adapted_matrices(loaded)] == [m.budget for m in adapted_matrices(model)]
    assert [m.nonzeros() for m in adapted_matrices(loaded)] == [m.budget for m in adapted_matrices(model)]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def _group_sizes(matrix):
    return [rows * matrix.layer.in_features for rows in matrix.layer.row_counts[matrix.adapter_name]]


def test_saved_adapter_does_not_contain_base_weights(case, tmp_path):
    case.adapted().save_pretrained(tmp_path)
    assert all(".snella_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_disabled_adapter_gives_base_model(case):
    base = case.base()
    before = case.predict(base)
    model = get_peft_model(base, case.config()).eval()
    after = case.predict(model)
    with model.disable_adapter():
        assert torch.equal(case.predict(model), before)
    assert torch.equal(case.predict(model), after)
    model.base_model.disable_adapter_layers()
    assert torch.equal(case.predict(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.base_model.enable_adapter_layers()
    assert torch.equal(case.predict(model), after)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_merge_preserves_outputs_and_unmerge_restores_weights(case):
    model = case.adapted()
    expected, weights = case.predict(model), snapshot(model)
    model.merge_adapter()
    case.assert_unchanged_by_merging(case.predict(model), expected)
    assert any(not torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    model.unmerge_adapter()
    assert_same_tensors(model.state_dict(), weights)
    assert torch.equal(case.predict(model), expected)


def test_merge_and_unload_gives_plain_model(case):
    names = list(case.base().state_dict())
    model = case.adapted()
    expected = case.predict(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(case.base())
    assert list(merged.state_dict()) == names
    assert not any("snella" in type(module).__module__ for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    case.assert_unchanged_by_merging(case.predict(merged), expected)
    fresh = case.base()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(case.predict(fresh), case.predict(merged))


def test_unload_restores_base_model(case):
    model = case.adapted()
    case.predict(model)
    restored = model.unload()
    assert_same_tensors(restored.state_dict(), case.base().state_dict())
    assert torch.equal(case.predict(restored), case.predict(case.base()))


def test_copies_and_pickles_are_bit_identical(case):
    model = case.adapted()
    expected = case.predict(model)
    copied = copy.deepcopy(model)
    assert torch.equal(case.predict(copied), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(case.predict(torch.load(buffer, weights_only=False)), expected)
    layers(copied)[0].snella_A["default"].data.zero_()
    assert torch.equal(case.predict(model), expected)


def test_adapter_can_be_injected_without_wrapper(case):
    source = case.adapted()
    state = get_peft_model_state_dict(source)
    assert state
    assert not any("default" in name for name in state)
    target = inject_adapter_in_model(case.config(), case.base(), adapter_name="mine").eval()
    target.peft_config = {"mine": case.config()}
    result = set_peft_model_state_dict(target, state, adapter_name="mine")
    assert not result.unexpected_keys
    assert torch.equal(case.predict(target), case.predict(source))


def test_root_level_bias_of_injected_adapter_keeps_its_name(mlp):
    base = mlp.base()
    base.bias = nn.Parameter(torch.zeros(3))
    state = get_peft_model_state_dict(inject_adapter_in_model(mlp.config(bias="all"), base))
    assert "bias" in state


# one model per kind of layer ----------------------------------------------------------------------------------------


def test_model_pickled_by_the_standard_library_is_bit_identical(kind):
    model = kind.adapted()
    assert torch.equal(kind.predict(pickle.loads(pickle.dumps(model))), kind.predict(model))


def test_low_cpu_mem_usage_is_bit_identical(kind, tmp_path):
    model = kind.adapted(modules_to_save=kind.head)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(kind.predict(loaded), kind.predict(model))
    model.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=True)
    expected = kind.predict(model)
    model.set_adapter("second")
    assert torch.equal(kind.predict(model), expected)


def test_injection_with_low_cpu_mem_usage_creates_meta_factors(mlp):
    model = inject_adapter_in_model(mlp.config(), mlp.base(), low_cpu_mem_usage=True)
    assert all(parameter.is_meta == (".snella_" in name) for name, parameter in model.named_parameters())


def test_adapters_with_different_configs_can_coexist(kind):
    model = kind.adapted(r=4)
    base = kind.predict(kind.base())
    first = kind.predict(model)
    model.add_adapter("second", kind.config(r=2, kernel="p_linear", init_sparsity=0.5, num_pieces=1))
    assert torch.equal(kind.predict(model), first)
    model.set_adapter("second")
    second = kind.predict(model)
    assert not torch.allclose(second, first)
    assert {matrix.factors[0].shape[1] for matrix in adapted_matrices(model)} == {2}
    assert all(matrix.budget / matrix.size == pytest.approx(0.5, abs=0.05) for matrix in adapted_matrices(model))
    model.base_model.set_adapter(["default", "second"])
    both = kind.predict(model)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.set_adapter("default")
    assert torch.equal(kind.predict(model), first)
    model.delete_adapter("second")
    assert torch.equal(kind.predict(model), first)
    model.delete_adapter("default")
    assert torch.equal(kind.predict(model.base_model), base)
    assert not any(".snella_" in name for name in model.state_dict())


def test_deleting_active_adapter_activates_another(mlp):
    model = mlp.adapted()
    expected = mlp.predict(model)
    model.add_adapter("second", mlp.config())
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(mlp.predict(model), expected)


def test_merged_adapter_cannot_be_deleted(mlp):
    model = mlp.adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")


def test_adapters_can_target_different_layers(mlp):
    model = mlp.adapted(target_modules=["lin0"])
    model.add_adapter("second", mlp.config(target_modules=["lin1"]))
    assert [matrix.name for matrix in adapted_matrices(model, "default")] == ["lin0"]
    assert [matrix.name for matrix in adapted_matrices(model, "second")] == ["lin1"]
    model.set_adapter("second")
    with_second = mlp.predict(model)
    model.set_adapter("default")
    assert not torch.allclose(mlp.predict(model), with_second)


def test_adapters_with_common_name_prefix_are_saved_separately(mlp, tmp_path):
    model = mlp.adapted()
    expected = mlp.predict(model)
    model.add_adapter("default2", mlp.config(r=2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path).eval()
    assert torch.equal(mlp.predict(loaded), expected)
    model.set_adapter("default2")
    loaded.load_adapter(str(tmp_path / "default2"), "defaul")
    loaded.set_adapter("defaul")
    assert torch.equal(mlp.predict(loaded), mlp.predict(model))


def test_only_active_adapter_requires_gradients(kind):
    model = kind.adapted()
    model.add_adapter("second", kind.config())

    def trained():
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"default"}
    model.set_adapter("second")
    assert trained() == {"second"}
    model.base_model.set_requires_grad("second", False)
    assert trained() == set()
    model.base_model.set_requires_grad(["second", "default"])
    assert trained() == {"second", "default"}


def test_loading_frozen_second_adapter_does_not_freeze_first(mlp, tmp_path):
    mlp.adapted().save_pretrained(tmp_path)
    model = mlp.adapted()
    model.load_adapter(str(tmp_path), "second", is_trainable=False)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_fixed_piece_coefficients_remain_frozen_after_switches(mlp):
    model = mlp.adapted(learn_piece_coeff=False)
    model.add_adapter("second", mlp.config())
    model.set_adapter("second")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    flags = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith(".default")}
    assert {flag for name, flag in flags.items() if "piece_coeff" in name} == {False}
    assert {flag for name, flag in flags.items() if "piece_coeff" not in name} == {True}


def test_unmatched_modules_to_save_are_reported(vit):
    expected = r"modules_to_save=\['hed'\] matches no module of VisionTransformer; its top-level modules are .*'head'\]"
    with pytest.warns(UserWarning, match=expected):
        vit.adapted(modules_to_save=["head", "hed"])


def test_unmatched_heads_of_peft_are_reported_unless_the_task_type_adds_them(vit):
    with pytest.warns(UserWarning, match=r"modules_to_save=\['classifier'\] matches no module of VisionTransformer"):
        vit.adapted(modules_to_save=["classifier"])
    SnellaModel(vit.base(), vit.config(modules_to_save=["classifier"], task_type="SEQ_CLS"), "default")


def test_modules_to_save_are_trained_and_saved(vit, tmp_path):
    model = vit.adapted(modules_to_save=["head"])
    assert {"head"} == {
        name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "snella" not in name
    }
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    expected = vit.predict(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit.base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(vit.predict(loaded), expected)
    assert torch.equal(vit.predict(loaded.merge_and_unload()), expected)


def test_mixed_adapters_in_one_batch_raise(mlp):
    model = mlp.adapted()
    with pytest.raises(NotImplementedError, match=r"adapter_names=\['default', '__base__'\]"):
        model(mlp.inputs(), adapter_names=["default", "__base__"])


def test_config_of_another_method_raises(mlp):
    from peft import LoraConfig

    with pytest.raises(TypeError, match="config must be a SnellaConfig, got LoraConfig"):
        SnellaModel(mlp.base(), LoraConfig(target_modules=["lin0"]), "default")


def test_repr_contains_layer_names(kind):
    text = repr(kind.adapted())
    assert "snella.Linear(" in text or "snella.Conv2d(" in text
    assert "snella_A" in text


def test_trainable_parameters_are_counted(vit):
    model = vit.adapted(modules_to_save=["head"])
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert total == sum(parameter.numel() for parameter in model.parameters()) > trainable


# corrupt or mismatched adapters -------------------------------------------------------------------------------------


def test_adapter_with_another_rank_raises_with_tensor_name(mlp, tmp_path):
    state = get_peft_model_state_dict(mlp.adapted(r=4))
    with pytest.raises(
        ValueError, match=r"lin0\.snella_A\.default has shape \[1, 10, 4\], the model needs \[1, 10, 2\]"
    ):
        set_peft_model_state_dict(mlp.adapted(r=2), state)


def test_missing_tensor_raises_with_name(mlp, tmp_path):
    model = mlp.adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    removed = next(name for name in state if "snella_budget" in name)
    save_file({name: tensor for name, tensor in state.items() if name != removed}, file)
    with pytest.raises(ValueError, match=r"snella_budget\.default is missing"):
        PeftModel.from_pretrained(mlp.base(), tmp_path)


def test_unexpected_tensor_raises_with_name(mlp):
    state = get_peft_model_state_dict(mlp.adapted())
    state["base_model.model.lin7.snella_A"] = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"does not fit PeftModel: base_model\.model\.lin7\.snella_A matches no layer"):
        set_peft_model_state_dict(mlp.adapted(), state)


def test_many_tensor_errors_are_abbreviated(vit):
    state = get_peft_model_state_dict(vit.adapted(r=4))
    with pytest.raises(ValueError, match=r"and \d+ more; load it into the architecture it was trained on"):
        set_peft_model_state_dict(vit.adapted(r=2), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_adapter_raises_with_tensor_name(mlp, value):
    state = get_peft_model_state_dict(mlp.adapted(r=4))
    state["base_model.model.lin0.snella_A"][0, 3, 1] = value
    with pytest.raises(ValueError, match=r"non-finite values: base_model\.model\.lin0\.snella_A\.default \(1 of 40\)"):
        set_peft_model_state_dict(mlp.adapted(r=4), state)


@pytest.mark.parametrize("budget", [-1, 121])
def test_adapter_with_a_budget_out_of_range_raises_with_layer_name(mlp, budget):
    state = get_peft_model_state_dict(mlp.adapted())
    state["base_model.model.lin0.snella_budget"][0] = budget
    message = rf"invalid budgets: budgets of 'base_model\.model\.lin0' must be .* from 0 to \[120\], got \[{budget}\]"
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(mlp.adapted(), state)


@pytest.mark.parametrize("is_second", [False, True], ids=["first", "second"])
def test_failed_injection_leaves_model_unchanged(is_second):
    torch.manual_seed(0)
    layers = {"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8), "qkv": nn.Linear(8, 24)}
    model = nn.ModuleDict({**layers, "embed": nn.Embedding(4, 8)})
    if is_second:
        model = get_peft_model(model, SnellaConfig(r=4, target_modules=["attn", "fc"]))
    modules = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = SnellaConfig(r=4, target_modules=["attn", "fc", "qkv", "embed"])
    with pytest.raises(TypeError, match="'embed'"):
        model.add_adapter("new", config) if is_second else get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_state_dict_without_factors_is_rejected(mlp, tmp_path):
    model = mlp.adapted()
    flat = {
        f"flat.{name}": value
        for name, value in model.state_dict().items()
        if "snella_A" not in name and "snella_B" not in name
    }
    with pytest.raises(ValueError, match=r"state_dict has \d+ entries, e\.g\. .*, but no factor of adapter 'default'"):
        model.save_pretrained(tmp_path / "flat", state_dict=flat)
    assert not (tmp_path / "flat" / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path / "full", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "rank_1", state_dict={}, is_main_process=False)


def test_saving_after_merge_and_unload_raises(mlp, tmp_path):
    model = mlp.adapted()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="MLP has no layer with adapter 'default'; save the adapter before"):
        model.save_pretrained(tmp_path)


def test_adapter_of_a_wrapped_layer_is_saved_completely(mlp, tmp_path):
    model = mlp.adapted()
    model.save_pretrained(tmp_path / "plain")
    base = model.get_base_model()
    for name, child in list(base.named_children()):
        if any("snella_A" in key for key in child.state_dict()):
            setattr(base, name, checkpoint_wrapper(child))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path / "wrapped")
    plain, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys() and any("snella_A" in name for name in plain)
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")  # one process
def test_adapter_of_a_model_in_fsdp_is_saved_completely(mlp):
    model = mlp.adapted()
    expected = get_peft_model_state_dict(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        mlp.predict(sharded)
        assert_same_tensors(get_peft_model_state_dict(sharded), expected)
    finally:
        dist.destroy_process_group()

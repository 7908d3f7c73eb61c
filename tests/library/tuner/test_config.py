"""`SnellaConfig`: presets, errors, files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from snella import SnellaConfig
from snella.matrices import adapted_matrices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preset": "offical"},
            r"^preset must be one of .*, got 'offical'; did you mean 'official'\?$",
        ),
        ({"kernel": "mix"}, r"kernel must be one of \[.*'mix_k'\], got 'mix'; did you mean 'mix_k'\?"),
        ({"kernel": 7}, "kernel must be of type str, got 7$"),
        ({"sparsify_mode": "hard"}, r"sparsify_mode must be one of \['soft', 'official', 'none'\], got 'hard'"),
        ({"allocation": "unifrom"}, r"allocation must be one of .* got 'unifrom'; did you mean 'uniform'\?"),
        (
            {"match_update": True, "kernel": "rbf"},
            r"match_update=True requires a kernel in .* got kernel='rbf'",
        ),
        ({"schedule_end": 0.0}, r"schedule_end must be in \(0, 1\], got 0.0; 1 is the end of training"),
        ({"schedule_end": 1.5}, r"schedule_end must be in \(0, 1\], got 1.5"),
        ({"schedule": "cube"}, r"schedule must be one of .* got 'cube'; did you mean 'cubic'\?"),
        ({"importance": "sensitive"}, r"importance must be one of .* got 'sensitive'; did you mean 'sensitivity'\?"),
        ({"impl": "fast"}, r"impl must be one of .* got 'fast'"),
        ({"r": 8, "num_pieces": 3}, "r must be divisible by num_pieces=3, got r=8; use r=6 or r=9"),
        ({"r": 7}, "r must be divisible by num_pieces=2, got r=7; use r=6 or r=8"),
        ({"r": 1}, "r must be divisible by num_pieces=2, got r=1; use r=2"),
        ({"r": 0}, "^r must be at least 1, got r=0$"),
        ({"num_pieces": 0, "kernel": "linear"}, "^num_pieces must be at least 1, got num_pieces=0$"),
        (
            {"target_sparsity": 1.0},
            r"target_sparsity must be in \[0, 1\), got 1\.0; 0\.9 keeps .*; to train only the head, .*linear",
        ),
        ({"target_sparsity": 70}, r"target_sparsity must be in \[0, 1\), got 70; did you mean 0\.7\?"),
        ({"target_sparsity": 100}, r"target_sparsity must be in \[0, 1\), got 100$"),
        ({"target_sparsity": -0.1}, r"target_sparsity must be in \[0, 1\), got -0\.1"),
        (
            {"init_sparsity": 0.8},
            r"init_sparsity must be in \[0, target_sparsity\], got 0\.8 with target_sparsity=0\.7",
        ),
        ({"init_sparsity": -0.5}, r"init_sparsity must be in .* got -0\.5"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1\.0"),
        ({"beta2": -0.2}, r"beta2 must be in \[0, 1\), got -0\.2"),
        ({"update_dropout": 1.0}, r"update_dropout must be in \[0, 1\), got 1\.0"),
        ({"update_drop_path": 2}, r"update_drop_path must be in \[0, 1\), got 2"),
        ({"min_layer_share": 1.01}, r"min_layer_share must be in \[0, 1\], got 1\.01"),
        ({"weight_gradient": "sample:2"}, "weight_gradient must be 'exact', 'bfloat16' or .* got 'sample:2'"),
        ({"softmax_dim": 2}, "softmax_dim must be 0 or 1, got 2"),
        ({"realloc_every": 0}, "realloc_every must be 'epoch' or a positive number of steps, got 0"),
        ({"realloc_every": "step"}, "realloc_every must be 'epoch' or .* got 'step'"),
        ({"realloc_every": True}, r"realloc_every must be of type int \| str, got True"),
        ({"qkv_groups": 0}, "qkv_groups must be 'auto', a positive integer, or a mapping to .* of them, got 0"),
        ({"qkv_groups": "three"}, "qkv_groups must be .* got 'three'"),
        ({"qkv_groups": {"fc1": 2, "qkv": 0}}, r"qkv_groups must be .* got \{'fc1': 2, 'qkv': 0\}"),
        ({"qkv_groups": {"qkv": [32, -8]}}, r"qkv_groups must be .* got \{'qkv': \[32, -8\]\}"),
        (
            {"target_modules": r".*fc\d", "layers_to_transform": [1]},
            r"layers_to_transform cannot be combined with a regular expression, got target_modules='\.\*fc.*' and "
            r"layers_to_transform=\[1\]; put the block indices into the regular expression",
        ),
        (
            {"target_modules": ".*fc", "layers_to_transform": [1], "layers_pattern": "h"},
            "layers_pattern cannot be combined with a regular expression",
        ),
        ({"layers_pattern": "blocks"}, "layers_pattern requires layers_to_transform, got layers_pattern='blocks'"),
    ],
)
def test_value_out_of_range_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        SnellaConfig(**settings)


def test_all_errors_are_reported_together():
    with pytest.raises(ValueError) as records:
        SnellaConfig(r=7, target_sparsity=1.5, importance="rbff", beta1=3, schedule="x", softmax_dim=-1)
    message = str(records.value)
    for part in ("r=7", "got 1.5", "'rbff'", "beta1 must be in [0, 1), got 3", "schedule must be", "got -1"):
        assert part in message
    assert message.count("; ") >= 5


def test_unknown_field_raises():
    with pytest.raises(TypeError, match="target_sparsitty"):
        SnellaConfig(target_sparsitty=0.5)


def test_kernels_without_pieces_accept_any_rank():
    assert SnellaConfig(r=7, kernel="linear").r == 7
    assert SnellaConfig(r=7, kernel="rbf").r == 7


def test_paper_preset_is_the_default():
    config = SnellaConfig()
    assert (config.sparsify_mode, config.learn_piece_coeff, config.learn_temperature) == ("soft", True, False)
    assert (config.update_dropout, config.update_drop_path, config.zero_init_ema) == (0.0, 0.0, False)
    assert (config.r, config.kernel, config.num_pieces, config.target_sparsity) == (8, "mix_k", 2, 0.7)
    assert (config.beta1, config.beta2, config.schedule, config.realloc_every) == (0.85, 0.85, "cubic", "epoch")
    assert config.parameters_to_save == []


def test_official_preset_sets_the_values_of_the_authors_code():
    config = SnellaConfig(preset="official")
    assert (config.sparsify_mode, config.learn_piece_coeff, config.learn_temperature) == ("official", False, True)
    assert (config.update_dropout, config.update_drop_path, config.zero_init_ema) == (0.1, 0.1, True)
    assert "proj" in config.dropout_exclude
    assert config.parameters_to_save == ["cls_token"]


def test_user_values_override_preset():
    config = SnellaConfig(preset="official", update_dropout=0.0, learn_piece_coeff=True, dropout_exclude=[])
    assert (config.update_dropout, config.learn_piece_coeff, config.dropout_exclude) == (0.0, True, [])
    assert config.update_drop_path == 0.1


def test_preset_values_are_not_shared_between_configs():
    SnellaConfig(preset="official").dropout_exclude.append("changed")
    assert "changed" not in SnellaConfig(preset="official").dropout_exclude


def test_saved_config_is_loaded_unchanged(tmp_path):
    config = SnellaConfig(
        r=4,
        kernel="p_linear",
        preset="official",
        target_modules=["qkv", "proj"],
        exclude_modules=["head"],
        qkv_groups={"qkv": [4, 2, 2]},
        realloc_every=50,
        modules_to_save=["head"],
        parameters_to_save=["cls_token"],
    )
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "SNELLA"
    assert sorted(stored["target_modules"]) == ["proj", "qkv"]
    for loaded in (SnellaConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is SnellaConfig
        assert loaded == config


def test_corrupt_config_file_raises(tmp_path):
    SnellaConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text()) | {"target_sparsity": 7}
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"target_sparsity must be in \[0, 1\), got 7"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_configs_can_be_copied_and_pickled():
    config = SnellaConfig(r=4, target_modules=["a"])
    for copied in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert copied.peft_type == "SNELLA"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8.0}, "r must be of type int, got 8.0"),
        ({"target_sparsity": "0.7"}, "target_sparsity must be of type float, got '0.7'"),
        ({"scaling": 0.0}, "scaling must be finite and not 0, got 0.0"),
        ({"scaling": float("nan")}, "scaling must be finite and not 0, got nan"),
        ({"update_dropout": "a"}, r"update_dropout must be of type float \| None, got 'a'"),
        ({"rank_pattern": {"fc1": 2.0}}, r"rank_pattern must be of type dict\[str, int\], got \{'fc1': 2.0\}"),
        ({"modules_to_save": "head"}, r"modules_to_save must be of type list\[str\] \| None, got 'head'"),
    ],
)
def test_wrong_type_raises_with_field_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SnellaConfig(**settings)


def test_type_errors_are_reported_together():
    with pytest.raises(ValueError, match=r"^r must be of type int, got '8'; scaling must be of type float, got None$"):
        SnellaConfig(r="8", scaling=None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("target_sparsitty", r"did you mean 'target_sparsity'\?"),
        ("lora_alpha", "the update is multiplied by scaling"),
        ("alpha", "the update is multiplied by scaling"),
        ("rank", "the rank is r"),
        ("init_r", "the rank is r"),
        ("dropout", "update_dropout"),
        ("lora_dropout", "update_dropout"),
        ("sparsity", "the final fraction of zeros is target_sparsity"),
        ("tfinal", "BudgetAllocator sets the length of the schedule"),
        ("deltaT", "realloc_every"),
        (
            "target_parameters",
            r"use LoraConfig\(target_parameters=…\) or train them in full with parameters_to_save",
        ),
        ("use_dora", r"use LoraConfig\(use_dora=True\)"),
    ],
)
def test_fields_of_other_methods_raise_with_a_hint(name, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; .*{hint}"):
        SnellaConfig(**{name: 1})


def test_unknown_fields_are_reported_together():
    message = r"argument 'rank'; the rank is r; .* argument 'alpha'; the update is multiplied by scaling"
    with pytest.raises(TypeError, match=message):
        SnellaConfig(rank=8, alpha=16)


# method name --------------------------------------------------------------------------------------------------------


def test_peft_type_is_a_string_with_a_value():
    name = SnellaConfig().peft_type
    assert name == "SNELLA" and hash(name) == hash("SNELLA") and {name: 1}["SNELLA"] == 1
    assert type(name.value) is str and name.value == "SNELLA"
    assert json.dumps({"peft_type": name}) == '{"peft_type": "SNELLA"}'
    for copied in (copy.copy(name), copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert copied == "SNELLA" and copied.value == "SNELLA"


# files --------------------------------------------------------------------------------------------------------------


def test_saved_config_is_reproducible_across_processes(tmp_path):
    code = (
        "import sys; from snella import SnellaConfig; "
        "SnellaConfig(target_modules=list('hgfedcba'), exclude_modules=list('zyxw')).save_pretrained(sys.argv[1])"
    )
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    first, second = ((tmp_path / seed / "adapter_config.json").read_bytes() for seed in ("1", "2"))
    assert first == second
    assert json.loads(first)["target_modules"] == list("abcdefgh")


def test_model_card_contains_loading_instructions(mlp, tmp_path):
    model = mlp.adapted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import snella") == 1
    assert "otherwise loading fails with\n`KeyError: 'SNELLA'`" in card


def test_rank_mismatch_raises_before_allocation(mlp, tmp_path):
    mlp.adapted().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 1_000_000_000_000}))
    with pytest.raises(
        ValueError, match=r"sets rank 1000000000000 for .*, but .* contains .*snella_A of shape \[1, 10, 4\]"
    ):
        PeftModel.from_pretrained(mlp.base(), tmp_path)


def test_damaged_tensors_raise_with_the_path(mlp, tmp_path):
    mlp.adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged: .*; save the adapter again"):
        PeftModel.from_pretrained(mlp.base(), tmp_path)


def test_excessive_rank_raises(mlp):
    with pytest.raises(ValueError, match=r"r=1000000000000 creates [\d,]+ factor entries for 216 adapted weights"):
        get_peft_model(mlp.base(), SnellaConfig(r=1_000_000_000_000))
    with pytest.raises(ValueError, match=r"r=8, rank_pattern=\{'lin1': 1000000000000\} creates"):
        get_peft_model(mlp.base(), SnellaConfig(rank_pattern={"lin1": 1_000_000_000_000}))


# rank_pattern -------------------------------------------------------------------------------------------------------


def test_rank_pattern_sets_ranks_of_layers(vit, tmp_path):
    ranks = {"fc1": 2, "blocks.0.mlp.fc1": 8, "attn.qkv": 6}
    model = vit.adapted(rank_pattern=ranks)
    actual = {m.module_name: m.factors[0].shape[1] for m in adapted_matrices(model)}
    assert actual["blocks.0.mlp.fc1"] == 8 and actual["blocks.1.mlp.fc1"] == 2
    assert actual["blocks.3.attn.qkv"] == 6 and actual["blocks.3.attn.proj"] == 4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit.base(), tmp_path).eval()
    assert torch.equal(vit.predict(loaded), vit.predict(model))
    assert torch.equal(vit.predict(loaded.merge_and_unload()), vit.predict(model))


def test_rank_pattern_sets_ranks_of_projections(cases):
    model = cases["torch_vit"].adapted(rank_pattern={"in_proj": 2, "out_proj": 6})
    actual = {m.module_name.rpartition(".")[2]: m.factors[0].shape[1] for m in adapted_matrices(model)}
    assert (actual["in_proj"], actual["out_proj"], actual["0"]) == (2, 6, 4)


def test_unmatched_rank_pattern_raises(mlp):
    with pytest.raises(ValueError, match=r"rank_pattern=\['fc7'\] matches no adapted module; .* \['lin0', 'lin1'\]"):
        get_peft_model(mlp.base(), SnellaConfig(rank_pattern={"fc7": 4, "lin0": 2}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": range(2)}, [0, 1]),
        ({"trainable_token_indices": {2, 1}}, [1, 2]),
        ({"trainable_token_indices": {"embedding": range(2)}}, {"embedding": [0, 1]}),
        ({"qkv_groups": {"qkv": (4, 2)}}, {"qkv": [4, 2]}),
        ({"modules_to_save": ("head",)}, ["head"]),
    ],
)
def test_ranges_tuples_and_sets_are_saved_as_lists(settings, expected, tmp_path):
    config, (name,) = SnellaConfig(**settings), settings
    assert getattr(config, name) == expected
    config.save_pretrained(str(tmp_path))
    assert getattr(SnellaConfig.from_pretrained(str(tmp_path)), name) == expected


def test_unmatched_qkv_groups_raise(mlp):
    with pytest.raises(ValueError, match=r"qkv_groups=\['qvk'\] matches no adapted module; .* \['lin0', 'lin1'\]"):
        get_peft_model(mlp.base(), SnellaConfig(qkv_groups={"qvk": 3, "lin0": 2}))


def test_rank_pattern_of_a_second_adapter_sets_the_rank_of_an_output_projection(cases):
    model = cases["torch_vit"].adapted()
    name = next(m.module_name for m in adapted_matrices(model) if m.module_name.endswith("out_proj"))
    model.add_adapter("second", SnellaConfig(r=8, rank_pattern={name: 2}, target_modules="all-linear"))
    ranks = {m.module_name: m.factors[0].shape[1] for m in adapted_matrices(model, "second")}
    assert ranks.pop(name) == 2
    assert set(ranks.values()) == {8}

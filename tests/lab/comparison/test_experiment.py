"""Experiments: bundled files, settings, errors, and merging with a stored experiment."""

import pytest

from snella_lab.comparison.experiment import Experiment, data_entry, folder_name, make_config, method_entry
from snella_lab.comparison.experiment_files import bundled_experiments, merged, read_experiment

BUNDLED = ("bundled-suite", "quick", "learning-rates")


def test_bundled_experiments_state_purpose_cost_and_expected_results():
    assert set(BUNDLED) <= set(bundled_experiments())
    for name in BUNDLED:
        experiment = read_experiment(name)
        assert experiment.name == name
        assert experiment.command.startswith(f"snella compare --experiment {name} --out ")
        assert min(len(experiment.about), len(experiment.cost), len(experiment.expected)) > 50


def test_suite_has_the_documented_methods_and_tasks():
    suite = read_experiment("bundled-suite")
    methods = "linear bias ssf vpt-deep adapter-8 lora-8 dora-8 spt-lora gps snell-8 snella-8 snella-matched-8 full"
    assert {entry.name for entry in suite.methods} == set(methods.split())
    assert {e.data for e in suite.data} == {"fashion-mnist", "stamps", "elpv", "mri-regions", "mnist5k", "digits"}
    assert suite.seeds == 3 and suite.reference_name == "lora-8"


def test_experiment_round_trips_through_its_file(tiny, tmp_path):
    entry = {"name": "big", "method": "snella-4", "options": {"kernel": "rbf"}, "scaling": 3.0}
    task = {"name": "few", "data": "digits", "group": "glyphs", "train_size": 30}
    experiment = tiny(methods=["linear", entry], data=["digits", task], forgetting=["stamps"])
    experiment.write(tmp_path)
    assert read_experiment(str(tmp_path / "experiment.yaml")) == experiment


def test_method_and_data_entries_override_shared_settings(tiny):
    experiment = tiny()
    method = method_entry({"method": "snella-4", "options": {"kernel": "rbf"}, "scaling": 3.0})
    data = data_entry({"data": "digits", "train_size": 30})
    config = make_config(method, data, experiment.settings, backbone="test_vit", out="-", seed=5)
    assert (config.method.scaling, config.method.options, config.data.train_size, config.run.seed) == (
        3.0,
        {"kernel": "rbf"},
        30,
        5,
    )
    assert (config.optim.epochs, config.data.test_size, config.method.r) == (1, 30, 4)


def test_reference_defaults_to_the_first_lora(tiny):
    assert tiny(methods=["linear", "lora-2", "lora-4"]).reference_name == "lora-2"
    assert tiny(methods=["linear", "bias"]).reference_name == "linear"
    assert tiny(methods=["linear", "bias"], reference="bias").reference_name == "bias"


def test_forgetting_is_never_measured_on_the_task_itself(tiny):
    experiment = tiny(data=["digits", "mnist5k", "elpv"])
    assert [experiment.probe_data(task) for task in experiment.data] == ["mnist5k", "digits", "digits"]
    single = tiny(data=["mnist5k"])
    assert single.probe_data(single.data[0]) == "digits"
    disabled = tiny(forgetting=[])
    assert disabled.probe_data(disabled.data[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["linear", "lorra-8"]}, r"got 'lorra-8'; nearest: lora"),
        ({"methods": [{"method": "lora-2", "options": {"alpha": 3}}]}, r"method 'lora-2' has no option 'alpha'"),
        ({"methods": ["lora-2", "lora-2"]}, "methods must have distinct folder names, got 'lora-2' and 'lora-2'"),
        ({"methods": [{"name": "x"}]}, r"every entry of methods must have 'method', got \{'name': 'x'\}"),
        ({"methods": [{"method": "linear", "scalling": 3}]}, r"'linear' has unknown settings: 'scalling' \(nearest"),
        ({"methods": [{"method": "linear", "options": [1]}]}, r"'linear' must have a mapping 'options', got \[1\]"),
        ({"methods": [3]}, "methods must contain names or mappings with 'method', got 3"),
        ({"data": [{"data": "digits", "size": 3}]}, r"data entry 'digits' has unknown settings: 'size' \(nearest"),
        ({"data": ["a/b", "a_b"]}, r"data must .* got 'a/b' and 'a_b' \(both use the folder 'a_b'\)"),
        ({"reference": "lora-8"}, r"reference must be one of the methods linear, lora-2, got 'lora-8' \(nearest: lo"),
        (
            {"grid": {"lr_factors": [0.3333333, 0.33333334]}},
            r"grid.lr_factors must differ within six digits, got \[0.3333333, 0.33333334\]",
        ),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seeds": "3"}, "seeds must be an integer of at least 1, got '3'"),
        ({"forgetting_images": 2}, "forgetting_images must be an integer of at least 10, got 2"),
        ({"grid": {"lr_factors": [0, 1]}}, r"grid.lr_factors must be positive numbers, got \[0.0, 1.0\]"),
        ({"grid": {"lr_factors": "0.3, one"}}, r"grid.lr_factors must be numbers, e.g. \[0.3, 1, 3\], got '0.3, one'"),
        ({"grid": {"weight_decays": [-1]}}, r"grid.weight_decays must be at least 0, got \[-1.0\]"),
        ({"grid": {"max_extensions": -1}}, "grid.max_extensions must be an integer of at least 0, got -1"),
        ({"grid": {"lr_factors": [True]}}, r"grid.lr_factors must be numbers, e.g. \[0.3, 1, 3\], got \[True\]"),
        ({"grid": {"lr_factor": [1]}}, r"grid has unknown settings: 'lr_factor' \(nearest: lr_factors"),
        ({"train": {"epoks": 3}}, r"train has unknown settings: 'epoks' \(nearest: epochs"),
        ({"train": {"epochs": -1}}, "epochs must be at least 0, got -1"),
        ({"train": {"seed": 3}}, "train has unknown settings: 'seed'"),
        ({"sedes": 3}, r"the experiment has unknown settings: 'sedes' \(nearest: seeds"),
        ({"backbone": ""}, "backbone is required, e.g. backbone: NAME"),
        ({"methods": ","}, "methods must have at least one entry, got none"),
        ({"data": ","}, "data must have at least one entry, got none"),
        ({"reference": 5}, "reference must be one of the methods linear, lora-2, got '5'"),
        ({"train": {"task": ["ordinal"]}}, r"task must be one of .* in a comparison, got \['ordinal'\]"),
    ],
)
def test_invalid_settings_are_rejected(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_the_default_weight_decays_are_no_search(tiny):
    grid = {"lr_factors": [1.0], "weight_decays": [1e-4]}
    experiment = tiny(methods=["linear"], grid=grid, train={"protocol": "official"})
    assert experiment.config(experiment.methods[0], experiment.data[0]).optim.weight_decay == 1e-4
    assert not experiment.has_search
    with pytest.raises(ValueError, match=r"grid.weight_decays must be \[\] .*, got \[1.0\] and \[0.0001, 0.1\]"):
        tiny(methods=["linear"], grid={**grid, "weight_decays": [1e-4, 0.1]}, train={"protocol": "official"})


def test_empty_options_of_a_method_are_the_defaults(tiny):
    assert tiny(methods=[{"method": "linear", "options": None}]).methods == tiny(methods=["linear"]).methods


@pytest.mark.parametrize("key", ["name", "about", "seeds", "reference", "forgetting_images", "published"])
def test_empty_entries_are_the_defaults(key, tiny, tmp_path):
    experiment = tiny(**{key: None})
    assert experiment == Experiment.from_dict({k: v for k, v in tiny().as_dict().items() if k != key})
    experiment.write(tmp_path)
    (tmp_path / "named.yaml").write_text((tmp_path / "experiment.yaml").read_text() + f"{key}:\n")
    assert read_experiment(str(tmp_path / "named.yaml")).name == ("named" if key == "name" else experiment.name)


def test_a_number_as_the_name_of_an_experiment_becomes_text(tiny):
    experiment = tiny(name=2024, about=5)
    assert (experiment.name, experiment.about) == ("2024", "5")


def test_tuples_in_settings_equal_the_stored_lists(tiny, tmp_path):
    entry = {"method": "lora-2", "options": {"target_modules": ("qkv", "proj")}}
    experiment = tiny(methods=[entry], reference=None)
    experiment.write(tmp_path)
    assert experiment.merged_with(read_experiment(str(tmp_path / "experiment.yaml")), tmp_path).name == experiment.name


def test_several_errors_are_reported_together(tiny):
    with pytest.raises(ValueError, match=r"seeds must be .* got 0; .*got 'lorra-8'"):
        tiny(seeds=0, methods=["lorra-8"])


@pytest.mark.parametrize("key", ["grid", "train"])
def test_section_that_is_not_a_mapping_is_rejected(key):
    with pytest.raises(ValueError, match=f"{key} must be a mapping, got 'x'"):
        Experiment.from_dict({"methods": "linear", "data": "digits", "backbone": "test_vit", key: "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("about: 2024-13-45\n", r"experiment .*e\.yaml must be a YAML text file: month must be in 1"),
        ("methods: [\n", r"experiment .*e\.yaml must be a YAML text file: "),
        ("- 1\n", r"experiment .*e\.yaml must contain settings such as 'seeds: 3', got list"),
        ("seeds: 2\n", r"experiment .*e\.yaml: methods is required"),
    ],
)
def test_invalid_file_is_rejected_with_its_name(content, message, tmp_path):
    (tmp_path / "e.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_experiment(str(tmp_path / "e.yaml"))


def test_unknown_experiment_suggests_the_nearest_name():
    with pytest.raises(FileNotFoundError, match=r"one of .*got 'quik'; nearest: quick"):
        read_experiment("quik")


def test_changes_override_single_settings_of_the_file():
    assert merged({"reference": "a", "seeds": 3}, {"methods": ["b"]})["reference"] is None
    assert merged({"reference": "a", "seeds": 3}, {"methods": ["b", "a"]})["reference"] == "a"
    assert merged({"seeds": 3, "grid": {"a": 1, "b": 2}}, {"grid": {"b": 3}}) == {"seeds": 3, "grid": {"a": 1, "b": 3}}
    experiment = read_experiment("quick", {"seeds": 5, "train": {"epochs": 2}})
    assert experiment.seeds == 5 and experiment.settings["epochs"] == 2 and experiment.settings["img_size"] == 42


def test_entries_selected_by_name_keep_their_settings():
    suite = read_experiment("bundled-suite")
    selection = read_experiment("bundled-suite", {"data": ["stamps", "mnist5k", "elpv"], "methods": ["lora-8", "vqt"]})
    assert [entry.name for entry in selection.data] == ["stamps", "mnist", "elpv"]
    assert all(entry in suite.data for entry in selection.data)
    assert [entry.method for entry in selection.methods] == ["lora-8", "vqt"] and selection.reference == "lora-8"
    official = read_experiment("table1-vtab-official", {"methods": ["snella-32"]})
    assert official.methods == read_experiment("table1-vtab-official").methods


def test_added_tasks_do_not_change_the_forgetting_data(tiny, tmp_path):
    stored = tiny(data=["mnist5k"]).with_probes()
    assert stored.forgetting == ("mnist5k", "digits")
    joined = tiny(data=["elpv"]).merged_with(stored, tmp_path)
    assert joined.forgetting == stored.forgetting and joined.probe_data(joined.data[0]) == "digits"
    assert tiny(data=["mnist5k"], forgetting=[]).merged_with(tiny(forgetting=[]), tmp_path).forgetting == ()
    with pytest.raises(ValueError, match="forgetting is"):
        tiny(data=["mnist5k"], forgetting=["elpv"]).merged_with(stored, tmp_path)


def test_methods_tasks_and_seeds_can_be_added_to_a_folder(tiny, tmp_path):
    stored = tiny(methods=["linear", "bias"], seeds=2)
    joined = tiny(methods=["lora-2", "linear"], data=["digits", "mnist5k"]).merged_with(stored, tmp_path)
    assert [entry.name for entry in joined.methods] == ["linear", "bias", "lora-2"]
    assert [entry.name for entry in joined.data] == ["digits", "mnist5k"] and joined.seeds == 2


def test_published_numbers_and_orderings_are_merged(tiny, tmp_path):
    stored_claim = {"higher": "bias", "lower": "linear"}
    stored = tiny(published={"source": "a", "values": {"bias": {"digits": 1.0}}, "orderings": [stored_claim]})
    assert tiny().merged_with(stored, tmp_path).published == stored.published
    added_claim = {"higher": "lora-2", "lower": "linear"}
    extended = tiny(
        published={"source": "a", "values": {"bias": {"digits": 2.0}}, "orderings": [stored_claim, added_claim]}
    )
    assert extended.merged_with(stored, tmp_path).published == {
        "source": "a",
        "values": {"bias": {"digits": 2.0}},
        "orderings": [stored_claim, added_claim],
    }
    assert stored.merged_with(tiny(), tmp_path).published == stored.published
    other_source = tiny(published={"source": "b", "orderings": [added_claim]})
    assert other_source.merged_with(stored, tmp_path).published == other_source.published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"epochs": 7}}, r"train\.epochs is 1, got 7"),
        ({"backbone": "test_vit2"}, "backbone is 'test_vit', got 'test_vit2'"),
        ({"grid": {"lr_factors": [1]}}, r"grid\.lr_factors is \[0.3, 1.0\], got \[1.0\]"),
        ({"methods": [{"name": "linear", "method": "bias"}]}, "methods entry 'linear' has different settings"),
    ],
)
def test_settings_that_differ_from_the_stored_rows_are_rejected(changes, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(**changes).merged_with(tiny(), tmp_path)


def test_labels_become_folder_names():
    assert folder_name("folder:my photos/2") == "folder_my_photos_2"
    assert folder_name("../..") == "_"


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ("Table 1", "published must be a mapping, got 'Table 1'"),
        (["a"], r"published must be a mapping, got \['a'\]"),
        ([], r"published must be a mapping, got \[\]"),
        ({"source": "a", "orderings": None}, "published must contain 'source', .* a list 'orderings', or both"),
        ({"source": "a", "orderings": 5}, "published must contain 'source', .* got .*'orderings': 5"),
    ],
)
def test_published_values_of_another_type_are_rejected(published, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(published=published)


def test_empty_name_and_group_default_to_the_data():
    assert method_entry({"method": "lora-2", "name": None}).name == "lora-2"
    entry = data_entry({"data": "digits", "name": None, "group": None})
    assert (entry.name, entry.group) == ("digits", "digits")


def test_long_labels_have_short_folder_names():
    names = [folder_name(f"csv:{'a' * 300}{end}") for end in "bc"]
    assert all(len(name) == 100 for name in names) and names[0] != names[1]
    assert folder_name(f"csv:{'a' * 90}") == f"csv_{'a' * 90}"


def test_labels_outside_ascii_have_distinct_folder_names(tiny):
    names = [folder_name(label) for label in ("猫", "犬", "fotos/größe", "fotos/grüße")]
    assert len(set(names)) == 4 and all(name.isascii() for name in names) and names[2].startswith("fotos_gr_e-")
    assert len(folder_name("猫" * 300)) <= 100
    assert len(tiny(data=["猫", "犬"]).data) == 2

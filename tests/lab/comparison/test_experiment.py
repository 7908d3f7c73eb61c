"""What an experiment says, what it refuses, and what may change in a folder that has rows."""

import pytest

from snella_lab.comparison.experiment import Experiment, data_entry, folder_name, make_config, method_entry
from snella_lab.comparison.experiment_files import bundled_experiments, merged, read_experiment

MINE = ("bundled-suite", "coffee", "learning-rates")


def test_the_experiments_that_ship_say_what_they_are_and_what_they_cost():
    assert set(MINE) <= set(bundled_experiments())
    for name in MINE:
        experiment = read_experiment(name)
        assert experiment.name == name
        assert experiment.command.startswith(f"snella compare --experiment {name} --out ")
        assert min(len(experiment.about), len(experiment.cost), len(experiment.expected)) > 50


def test_the_suite_has_the_methods_and_tasks_that_it_promises():
    suite = read_experiment("bundled-suite")
    methods = "linear bias ssf vpt-deep adapter-8 lora-8 dora-8 spt-lora gps snell-8 snella-8 snella-matched-8 full"
    assert {entry.name for entry in suite.methods} == set(methods.split())
    assert {e.data for e in suite.data} == {"fashion-mnist", "stamps", "elpv", "mri-regions", "mnist5k", "digits"}
    assert suite.seeds == 3 and suite.reference_name == "lora-8"


def test_an_experiment_survives_its_file(tiny, tmp_path):
    entry = {"name": "big", "method": "snella-4", "options": {"kernel": "rbf"}, "scaling": 3.0}
    task = {"name": "few", "data": "digits", "group": "glyphs", "train_size": 30}
    experiment = tiny(methods=["linear", entry], data=["digits", task], forgetting=["stamps"])
    experiment.write(tmp_path)
    assert read_experiment(str(tmp_path / "experiment.yaml")) == experiment


def test_entries_and_data_have_settings_of_their_own(tiny):
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


def test_the_reference_is_the_first_lora_unless_it_is_named(tiny):
    assert tiny(methods=["linear", "lora-2", "lora-4"]).reference_name == "lora-2"
    assert tiny(methods=["linear", "bias"]).reference_name == "linear"
    assert tiny(methods=["linear", "bias"], reference="bias").reference_name == "bias"


def test_forgetting_is_never_probed_on_the_task_itself(tiny):
    experiment = tiny(data=["digits", "mnist5k", "elpv"])
    assert [experiment.probe_data(task) for task in experiment.data] == ["mnist5k", "digits", "digits"]
    alone = tiny(data=["mnist5k"])
    assert alone.probe_data(alone.data[0]) == "digits"
    none = tiny(forgetting=[])
    assert none.probe_data(none.data[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["linear", "lorra-8"]}, r"got 'lorra-8'; nearest: lora"),
        ({"methods": [{"method": "lora-2", "options": {"alpha": 3}}]}, r"method 'lora-2' has no option 'alpha'"),
        ({"methods": ["lora-2", "lora-2"]}, "methods must have distinct names, got 'lora-2' and 'lora-2'"),
        ({"methods": [{"name": "x"}]}, r"methods must have 'method' in every entry, got \{'name': 'x'\}"),
        (
            {"methods": [{"method": "linear", "scalling": 3}]},
            r"'linear' has unknown settings: 'scalling' \(nearest",
        ),
        ({"methods": [3]}, "methods must hold names or mappings with 'method', got 3"),
        ({"data": [{"data": "digits", "size": 3}]}, r"data entry 'digits' has unknown settings: 'size' \(nearest"),
        ({"data": ["a/b", "a_b"]}, "data must have distinct names, got 'a/b' and 'a_b'"),
        (
            {"reference": "lora-8"},
            r"reference must be one of the methods linear, lora-2, got 'lora-8' \(nearest: lo",
        ),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seeds": "3"}, "seeds must be an integer of at least 1, got '3'"),
        ({"forgetting_images": 2}, "forgetting_images must be an integer of at least 10, got 2"),
        ({"grid": {"lr_factors": [0, 1]}}, r"grid.lr_factors must be positive numbers, got \[0.0, 1.0\]"),
        ({"grid": {"lr_factors": "0.3, one"}}, r"grid.lr_factors must be numbers, e.g. \[0.3, 1, 3\], got '0.3, one'"),
        ({"grid": {"weight_decays": [-1]}}, r"grid.weight_decays must be at least 0, got \[-1.0\]"),
        ({"grid": {"max_extensions": -1}}, "grid.max_extensions must be an integer of at least 0, got -1"),
        ({"grid": {"lr_factor": [1]}}, r"grid has unknown settings: 'lr_factor' \(nearest: lr_factors"),
        ({"train": {"epoks": 3}}, r"train has unknown settings: 'epoks' \(nearest: epochs"),
        ({"train": {"epochs": -1}}, "epochs must be at least 0, got -1"),
        ({"train": {"seed": 3}}, "train has unknown settings: 'seed'"),
        ({"sedes": 3}, r"the experiment has unknown settings: 'sedes' \(nearest: seeds"),
        ({"backbone": ""}, "backbone is required, e.g. backbone: NAME"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_several_mistakes_are_told_together(tiny):
    with pytest.raises(ValueError, match=r"seeds must be .* got 0; .*got 'lorra-8'"):
        tiny(seeds=0, methods=["lorra-8"])


@pytest.mark.parametrize("key", ["grid", "train"])
def test_a_part_of_the_file_that_is_no_mapping_is_named(key):
    with pytest.raises(ValueError, match=f"{key} must be a mapping, got 'x'"):
        Experiment.from_dict({"methods": "linear", "data": "digits", "backbone": "test_vit", key: "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methods: [\n", r"experiment .*e\.yaml must be a YAML text file: "),
        ("- 1\n", r"experiment .*e\.yaml must hold settings such as 'seeds: 3', got list"),
        ("seeds: 2\n", r"experiment .*e\.yaml: methods is required"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(content, message, tmp_path):
    (tmp_path / "e.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_experiment(str(tmp_path / "e.yaml"))


def test_an_unknown_experiment_is_told_the_nearest_name():
    with pytest.raises(FileNotFoundError, match=r"one of .*got 'cofee'; nearest: coffee"):
        read_experiment("cofee")


def test_changes_go_before_the_file_one_by_one():
    assert merged({"reference": "a", "seeds": 3}, {"methods": ["b"]})["reference"] is None
    assert merged({"reference": "a", "seeds": 3}, {"methods": ["b", "a"]})["reference"] == "a"
    assert merged({"seeds": 3, "grid": {"a": 1, "b": 2}}, {"grid": {"b": 3}}) == {"seeds": 3, "grid": {"a": 1, "b": 3}}
    experiment = read_experiment("coffee", {"seeds": 5, "train": {"epochs": 2}})
    assert experiment.seeds == 5 and experiment.settings["epochs"] == 2 and experiment.settings["img_size"] == 42


def test_entries_that_are_asked_for_by_name_keep_what_the_file_says_of_them():
    whole = read_experiment("bundled-suite")
    part = read_experiment("bundled-suite", {"data": ["stamps", "mnist5k", "elpv"], "methods": ["lora-8", "vqt"]})
    assert [entry.name for entry in part.data] == ["stamps", "mnist", "elpv"]
    assert all(entry in whole.data for entry in part.data)
    assert [entry.method for entry in part.methods] == ["lora-8", "vqt"] and part.reference == "lora-8"
    official = read_experiment("table1-vtab-official", {"methods": ["snella-32"]})
    assert official.methods == read_experiment("table1-vtab-official").methods


def test_data_added_later_does_not_change_what_forgetting_is_probed_on(tiny, tmp_path):
    stored = tiny(data=["mnist5k"]).with_probes()
    assert stored.forgetting == ("mnist5k", "digits")
    joined = tiny(data=["elpv"]).joined_with(stored, tmp_path)
    assert joined.forgetting == stored.forgetting and joined.probe_data(joined.data[0]) == "digits"
    assert tiny(data=["mnist5k"], forgetting=[]).joined_with(tiny(forgetting=[]), tmp_path).forgetting == ()
    with pytest.raises(ValueError, match="forgetting is"):
        tiny(data=["mnist5k"], forgetting=["elpv"]).joined_with(stored, tmp_path)


def test_a_folder_takes_further_methods_tasks_and_seeds(tiny, tmp_path):
    stored = tiny(methods=["linear", "bias"], seeds=2)
    joined = tiny(methods=["lora-2", "linear"], data=["digits", "mnist5k"]).joined_with(stored, tmp_path)
    assert [entry.name for entry in joined.methods] == ["linear", "bias", "lora-2"]
    assert [entry.name for entry in joined.data] == ["digits", "mnist5k"] and joined.seeds == 2


def test_a_folder_keeps_the_papers_numbers_and_orderings_when_more_is_asked_for(tiny, tmp_path):
    above = {"higher": "bias", "lower": "linear"}
    stored = tiny(published={"source": "a", "values": {"bias": {"digits": 1.0}}, "orderings": [above]})
    assert tiny().joined_with(stored, tmp_path).published == stored.published
    again = {"higher": "lora-2", "lower": "linear"}
    more = tiny(published={"source": "a", "values": {"bias": {"digits": 2.0}}, "orderings": [above, again]})
    assert more.joined_with(stored, tmp_path).published == {
        "source": "a",
        "values": {"bias": {"digits": 2.0}},
        "orderings": [above, again],
    }
    assert stored.joined_with(tiny(), tmp_path).published == stored.published
    other = tiny(published={"source": "b", "orderings": [again]})
    assert other.joined_with(stored, tmp_path).published == other.published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"epochs": 7}}, "epochs is 1, got 7"),
        ({"backbone": "test_vit2"}, "backbone is 'test_vit', got 'test_vit2'"),
        ({"grid": {"lr_factors": [1]}}, r"lr_factors is \[0.3, 1.0\], got \[1.0\]"),
        ({"methods": [{"name": "linear", "method": "bias"}]}, "methods 'linear' has other settings"),
    ],
)
def test_a_folder_refuses_settings_that_its_rows_do_not_have(changes, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(**changes).joined_with(tiny(), tmp_path)


def test_labels_become_folder_names():
    assert folder_name("folder:my photos/2") == "folder_my_photos_2"
    assert folder_name("../..") == "_"

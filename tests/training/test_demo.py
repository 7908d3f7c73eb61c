import io

from rich.console import Console

from snella.training import RunFolder, run_demo
from snella.training.demo import DEMO_METHODS


def test_the_demonstration_compares_three_methods_on_one_split(photos, tmp_path):
    output = io.StringIO()
    sizes = {"train_size": 24, "val_size": 8, "test_size": 8}
    model = {"backbone": "test_vit", "pretrained": False, "img_size": 32, "batch_size": 8, "epochs": 1}
    settings = {"data": f"folder:{photos}", **sizes, **model, "device": "cpu", "progress": False}
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
    table = output.getvalue().rpartition("comparison")[2]
    for text in (
        "balanced accuracy",
        "trainable parameters",
        "seconds",
        "snella-8",
        f"{rows[0]['trainable_parameters']:,}",
    ):
        assert text in table
    for matrix in RunFolder(folder).read_json("allocation.json")["matrices"]:
        assert matrix["nonzeros"] == matrix["budget"]

"""One backbone, many tasks."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image

from snella import TaskBank
from snella_app.config.train import TrainConfig
from snella_app.runs import load_run
from snella_app.runs.model import make_backbone
from snella_app.runs.predict import load
from snella_app.training.train import train

COLORS = {"animals": {"cats": 10, "dogs": 10, "owls": 10}, "plants": {"oak": 12, "ash": 12}}


@pytest.fixture(scope="module")
def folders(make_photos, tiny_run, tmp_path_factory):
    """Runs of three tasks on one backbone, with different classes, ranks and sparsity."""
    root = tmp_path_factory.mktemp("bank")
    for name, counts in COLORS.items():
        make_photos(root / name, counts)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), root / "weights.pth")
    shared = {**tiny_run, "weights": str(root / "weights.pth"), "pretrained": True}
    runs = {}
    rows = [("animals", "animals", "snella-2", 0.5), ("plants", "plants", "snella-4", 0.9)]
    for name, data, method, sparsity in [*rows, ("again", "plants", "snella-2", 0.7)]:
        options = {"target_sparsity": sparsity, "init_sparsity": 0.3}
        settings = {**shared, "method": method, "method_options": options, "epochs": 1}
        config = TrainConfig.from_flat(**settings, data=f"folder:{root / data}", out=str(root / "runs" / name))
        train(config, render_report=False)
        runs[name] = root / "runs" / name
    return runs


@pytest.fixture
def images():
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


MIXED = ["plants", "animals", "plants", "again", "animals", "animals", "plants"]


def mib_per_task(folders):
    bank = TaskBank({"animals": folders["animals"]}, device="cpu")
    bank(torch.zeros(1, 3, 32, 32), ["animals"])
    return bank.cached_bytes / 2**20


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_a_mixed_batch_is_bit_identical_to_each_run(folders, images, capacity):
    task_mib = mib_per_task(folders)
    bank = TaskBank(folders, memory_mib=task_mib * (capacity + 0.1), device="cpu")
    for _ in range(3):
        outputs = bank(images, MIXED)
        for name, run in folders.items():
            rows = [row for row, task in enumerate(MIXED) if task == name]
            with torch.inference_mode():
                expected = load_run(run, "cpu").network(images[rows])
            assert torch.equal(torch.stack([outputs[row] for row in rows]), expected)
        assert bank.cached_bytes <= capacity * task_mib * 2**20 and len(bank.cached_tasks) == capacity
    assert bank.merges == {1: 3 + 2 + 2, 2: 3 + 1 + 1, 3: 3}[capacity]


def test_the_least_recently_used_task_is_evicted(folders, images):
    bank = TaskBank(folders, memory_mib=mib_per_task(folders) * 2.1, device="cpu")
    for name in ("animals", "plants", "animals", "again"):
        bank(images[:1], [name])
    assert bank.cached_tasks == ["animals", "again"] and bank.merges == 3


def test_memory_of_an_evicted_task_is_reused(folders, images):
    bank = TaskBank(folders, memory_mib=mib_per_task(folders) * 1.1, device="cpu")
    bank(images[:1], ["animals"])
    addresses = {t.data_ptr() for t in bank._cached["animals"].values()}
    bank(images[:1], ["plants"])
    assert {t.data_ptr() for t in bank._cached["plants"].values()} == addresses


def test_files_are_predicted_as_by_each_run(folders, make_photos, tmp_path):
    make_photos(tmp_path / "new", {"a": 3, "b": 2})
    paths = sorted((tmp_path / "new").rglob("*.png"))
    tasks = ["plants", "animals", "plants", "plants", "animals"]
    actual = TaskBank(folders, device="cpu").predict(paths, tasks, batch_size=2)
    for path, task, prediction in zip(paths, tasks, actual, strict=True):
        (expected,) = load(folders[task], "cpu").predict([path])
        assert prediction.path == path and prediction.label == expected.label
        assert prediction.probability == pytest.approx(expected.probability, abs=1e-6)


def test_a_bank_of_one_run_predicts_like_the_run(any_run, photos):
    paths = sorted((photos / "dogs").iterdir())
    actual = TaskBank({"photos": any_run.path}, device="cpu").predict(paths, ["photos"] * len(paths))
    for prediction, expected in zip(actual, load(any_run.path, "cpu").predict(paths), strict=True):
        assert prediction.label == expected.label
        assert prediction.probability == pytest.approx(expected.probability, abs=1e-6)


def test_tasks_can_be_added_and_removed(folders, images):
    bank = TaskBank({"animals": folders["animals"]}, device="cpu")
    assert bank.classes("animals") == ["cats", "dogs", "owls"]
    with pytest.raises(ValueError, match="task must be one of animals, got 'plants'"):
        bank(images[:1], ["plants"])
    bank.add("plants", folders["plants"])
    assert bank(images[:2], ["plants", "animals"])[0].shape == (2,) and bank.tasks == ["animals", "plants"]
    bank.remove("animals")
    assert bank.tasks == bank.cached_tasks == ["plants"]
    with pytest.raises(ValueError, match="got 1 names for 2 images"):
        bank(images[:2], ["plants"])


def test_a_task_can_be_removed_and_added_while_other_threads_predict(folders, images):
    bank = TaskBank({name: folders[name] for name in ("animals", "plants")}, device="cpu")
    tasks = ["plants"] * 3 + ["animals"] * 4
    expected = bank(images, tasks)
    stop, errors, predicted = threading.Event(), [], []

    def predict():
        while not stop.is_set():
            try:
                outputs = bank(images[3:], tasks[3:])
                assert all(map(torch.equal, outputs, expected[3:]))
                assert all(map(torch.equal, bank(images[:3], tasks[:3]), expected[:3]))
                predicted.append("plants")
            except Exception as error:
                if "task must be one of animals, got 'plants'" not in str(error):
                    errors.append(error)
                    return

    threads = [threading.Thread(target=predict) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            bank.remove("plants")
            assert bank.tasks == bank.cached_tasks == ["animals"]
            bank.add("plants", folders["plants"])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and predicted


def test_threads_that_fill_an_empty_bank_share_one_backbone(folders, images, monkeypatch):
    built, both = [], threading.Barrier(2)

    def build(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=2)  # until the other thread also builds a backbone
        built.append(make_backbone(*args))
        return built[-1]

    monkeypatch.setattr("snella_app.runs.task_bank.make_backbone", build)
    bank = TaskBank(device="cpu")
    with ThreadPoolExecutor() as pool:
        list(pool.map(bank.add, ["animals", "plants"], [folders["animals"], folders["plants"]]))
    assert len(built) == 1 and sorted(bank.tasks) == ["animals", "plants"]
    assert bank(images[:2], ["plants", "animals"])[0].shape == (2,)


def test_an_emptied_bank_accepts_another_backbone(folders, any_run, images):
    bank = TaskBank({"animals": folders["animals"]}, device="cpu")
    bank.remove("animals")
    bank.add("photos", any_run.path)
    with torch.inference_mode():
        expected = load_run(any_run.path, "cpu").network(images)
    assert torch.equal(torch.stack(bank(images, ["photos"] * len(images))), expected)


def test_unsupported_runs_are_rejected(folders, tiny_run, make_photos, tmp_path, no_report):
    with pytest.raises(
        ValueError, match=r"memory_mib must be at least 0\.\d for the effective weights of .*, got 0\.0"
    ):
        TaskBank(folders, memory_mib=0.01, device="cpu")
    with pytest.raises(ValueError, match="memory_mib must be greater than 0, got -1"):
        TaskBank(memory_mib=-1)
    photos = make_photos(tmp_path / "photos", {"a": 10, "b": 10})
    settings = {**tiny_run, "data": f"folder:{photos}", "epochs": 1, "method_options": {}}
    train(TrainConfig.from_flat(**{**settings, "method": "lora-2", "out": str(tmp_path / "lora")}))
    with pytest.raises(NotImplementedError, match="as SNELLA factors for a bank, got method 'lora-2'"):
        TaskBank({"lora": tmp_path / "lora"}, device="cpu")
    with pytest.raises(ValueError, match=r"must have the backbone and task of the bank, got .* instead of "):
        TaskBank(folders, device="cpu").add("random", tmp_path / "lora")
    train(TrainConfig.from_flat(**{**settings, "out": str(tmp_path / "two")}))
    more = make_photos(tmp_path / "more", {"a": 10, "b": 10, "c": 10})
    train(TrainConfig.from_flat(**{**settings, "data": f"folder:{more}", "out": str(tmp_path / "three")}))
    # a head of another size changes the random weights
    with pytest.raises(ValueError, match=r"weights that differ from the bank's in 'blocks\.0\.attn\.qkv\.weight';"):
        TaskBank({"two": tmp_path / "two", "three": tmp_path / "three"}, device="cpu")


def test_memory_can_be_unlimited_but_not_undefined(folders, images):
    bank = TaskBank(folders, memory_mib=float("inf"), device="cpu")
    bank(images, MIXED)
    assert len(bank.cached_tasks) == 3
    for memory in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"memory_mib must be greater than 0, got {memory}"):
            TaskBank(folders, memory_mib=memory)


def test_a_very_elongated_image_is_rejected_as_by_each_run(folders, tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="at most 200, got 3000×2"):
        TaskBank({"animals": folders["animals"]}, device="cpu").predict([tmp_path / "line.png"], ["animals"])


def test_a_string_instead_of_a_list_raises(folders, images):
    bank = TaskBank(dict(list(folders.items())[:1]))
    (name,) = bank.tasks
    with pytest.raises(TypeError, match=r"images must be a list of files, got 'a\.png'"):
        bank.predict("a.png", [name])
    with pytest.raises(TypeError, match=f"tasks must be a list of names, one per image, got {name!r}"):
        bank(images[:1], name)

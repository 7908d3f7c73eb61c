"""Multilabel, ordinal and regression tasks: data statistics and metrics."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, cohen_kappa_score, f1_score

from snella_app.data.datasets import Annotations, ImageDataset
from snella_app.data.sources import ArrayImages
from snella_app.tasks import ClassificationTask, MultiLabelTask, OrdinalTask, RegressionTask, create_task
from snella_app.tasks.classification import rank_order
from snella_app.tasks.multilabel import best_threshold, fit_thresholds
from snella_app.tasks.task import resolve_class_weights


def dataset(labels, targets=None):
    images = ArrayImages(np.zeros((len(labels), 4, 4), np.uint8))
    names = [str(row) for row in range(len(labels))]
    return ImageDataset(images, range(len(labels)), labels, names, annotations=Annotations(targets))


def test_balanced_class_weights_match_scikit_learn_and_have_mean_one():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [1] * 3 + [2]
    task = create_task("classification", ["a", "b", "c"], class_weights="balanced").fitted(dataset(labels))
    assert np.allclose(task.weight_by_class, compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert np.mean(np.asarray(task.weight_by_class)[labels]) == pytest.approx(1.0)
    assert task.sample_weights(dataset(labels)) == pytest.approx([1 / 6] * 6 + [1 / 3] * 3 + [1.0])


def test_a_class_without_images_cannot_be_balanced():
    task = create_task("classification", ["a", "b"], class_weights="balanced")
    with pytest.raises(ValueError, match="training images of every class, got none of 'b'; add images"):
        task.fitted(dataset([0, 0]))


def test_class_weights_by_name_are_checked():
    assert resolve_class_weights({"cat": 1, "dog": 2.5}, ["dog", "cat"], []) == (2.5, 1.0)
    assert resolve_class_weights("none", ["dog", "cat"], []) is None
    message = r"one weight per class \('dog', 'cat'\): no class 'dgo' \(nearest: 'dog'\); no weight for 'dog'"
    with pytest.raises(ValueError, match=message):
        resolve_class_weights({"cat": 1, "dgo": 2}, ["dog", "cat"], [])
    with pytest.raises(ValueError, match="at least 0 and finite, got 'cat': -1"):
        resolve_class_weights({"cat": -1, "dog": 2}, ["dog", "cat"], [])


def test_macro_f1_matches_scikit_learn():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), torch.randint(0, 3, (40,))
    scores = ClassificationTask(("a", "b", "c")).metrics(logits, labels)
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))


def test_epochs_are_compared_by_the_monitored_metric_in_its_direction():
    row = {"val_accuracy": 0.9, "val_balanced_accuracy": 0.6, "val_loss": 0.5}
    assert ClassificationTask(("a", "b"), monitor="balanced_accuracy").selection_score(row) == (0.6, -0.5)
    assert ClassificationTask(("a", "b"), monitor="loss").selection_score(row) == (-0.5, -0.5)
    assert RegressionTask(("age",), monitor="mae").selection_score({"val_mae": 3.0, "val_loss": 0.2}) == (-3.0, -0.2)


def test_multilabel_metrics_match_scikit_learn():
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 3), (torch.rand(60, 3) > 0.6).int()
    task = MultiLabelTask(("a", "b", "c"), thresholds=(0.3, 0.5, 0.7))
    scores, predicted = task.metrics(logits, labels), (logits.sigmoid() >= torch.tensor([0.3, 0.5, 0.7])).int()
    assert scores["map"] == pytest.approx(average_precision_score(labels, logits.sigmoid(), average="macro"))
    for average in ("macro", "micro"):
        assert scores[f"{average}_f1"] == pytest.approx(f1_score(labels, predicted, average=average))
    assert scores["subset_accuracy"] == pytest.approx(float((predicted == labels).all(1).float().mean()))
    assert scores["per_class"][2]["threshold"] == 0.7
    assert scores["per_class"][1]["support"] == int(labels[:, 1].sum())
    assert scores["loss"] == pytest.approx(
        float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float()))
    )


def test_labels_without_images_are_excluded_from_means():
    logits, labels = torch.tensor([[3.0, -3.0], [-3.0, -3.0]]), torch.tensor([[1, 0], [0, 0]])
    scores = MultiLabelTask(("a", "b")).metrics(logits, labels)
    assert scores["map"] == scores["macro_f1"] == 1.0
    assert scores["per_class"][1]["average_precision"] is None


def test_best_threshold_maximizes_f1():
    torch.manual_seed(0)
    probabilities, labels = torch.rand(50).double().numpy(), (torch.rand(50) > 0.7).int().numpy()
    scores = [f1_score(labels, probabilities >= t) for t in np.linspace(0, 1, 1001)]
    assert f1_score(labels, probabilities >= best_threshold(probabilities, labels)) >= max(scores) - 1e-12
    assert best_threshold(probabilities, np.zeros(50, int)) == 0.5
    assert best_threshold(np.full(3, 0.2), np.array([1, 0, 0])) == 0.1  # equal probabilities share one threshold


def test_fitted_thresholds_have_a_higher_f1_on_new_images_than_the_best_on_the_validation_images():
    generator = np.random.default_rng(0)
    fitted, best = [], []
    for _ in range(300):
        labels = (generator.random(2060) < 0.3).astype(int)
        probabilities = 1 / (1 + np.exp(-generator.normal(0, 1, 2060) - 2.5 * (labels - 0.5) + 2))
        val, new = slice(60), slice(60, None)
        (threshold,) = fit_thresholds(probabilities[val, None], labels[val, None])
        fitted.append(f1_score(labels[new], probabilities[new] >= threshold))
        best.append(f1_score(labels[new], probabilities[new] >= best_threshold(probabilities[val], labels[val])))
    gain = np.array(fitted) - np.array(best)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_thresholds_of_classes_do_not_depend_on_other_classes():
    generator = np.random.default_rng(0)
    probabilities, labels = generator.random((40, 3)), generator.integers(0, 2, (40, 3))
    labels[:, 2] = 0
    thresholds = fit_thresholds(probabilities, labels)
    assert fit_thresholds(probabilities[:, :1], labels[:, :1]) == thresholds[:1]
    assert thresholds[2] == 0.5 and all(0 < threshold < 1 for threshold in thresholds)


def test_positive_weights_are_the_ratio_of_images_without_and_with_the_label():
    data = dataset([0] * 5, [("a",), ("a", "b"), ("a",), (), ("b",)])
    task = create_task("multilabel", ["a", "b"], class_weights="balanced").fitted(data)
    assert task.positive_weights == pytest.approx((2 / 3, 3 / 2))
    assert task.sample_weights(data) == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1.0, 1 / 2])
    assert task.encode(("b",)).tolist() == [0.0, 1.0]
    assert task.remap_labels(torch.tensor([1.0]), [1]).tolist() == [0.0, 1.0]


def test_the_state_of_a_multilabel_task_is_its_thresholds():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1.0], [-2.0, 0.5]]).repeat(8, 1)
    labels = np.tile([[1, 1], [1, 0], [0, 0]], (8, 1))
    task = MultiLabelTask(("a", "b")).calibrated(logits, labels)
    restored = create_task("multilabel", ["a", "b"], **task.state())
    assert restored.thresholds == task.thresholds
    assert restored.metrics(logits, labels)["macro_f1"] == 1.0


def test_ordinal_metrics_use_ranks():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), torch.randint(0, 4, (40,))
    scores = OrdinalTask(tuple("0123"), loss_name="corn").metrics(logits, labels)
    ranks = (logits.double().sigmoid().cumprod(1) > 0.5).sum(1)
    assert scores["mae"] == pytest.approx(float((ranks - labels).abs().double().mean()))
    assert scores["kappa"] == pytest.approx(cohen_kappa_score(labels, ranks, weights="quadratic"))
    assert sum(map(sum, scores["confusion"])) == 40
    perfect = torch.full((2, 3), -9.0)
    assert OrdinalTask(tuple("0123"), loss_name="corn").metrics(perfect, [0, 0])["kappa"] == 1.0


def test_class_order_follows_numbers_or_is_required():
    assert rank_order(["0", "1", "10", "2"], None) == ["0", "1", "2", "10"]
    assert rank_order(["1 low", "2 high", "-1 none"], None) == ["-1 none", "1 low", "2 high"]
    assert rank_order(["high", "low", "mid"], "low, mid,high") == ["low", "mid", "high"]
    with pytest.raises(ValueError, match=r"class_order must list the classes .* e.g. high,low,mid, got none"):
        rank_order(["high", "low", "mid"], None)
    with pytest.raises(ValueError, match=r"got 'low,mid,hihg': no class 'hihg' \(nearest: 'high'\); no 'high'"):
        rank_order(["high", "low", "mid"], "low,mid,hihg")


def test_two_classes_are_not_ordinal():
    with pytest.raises(ValueError, match="task ordinal needs at least 3 classes, got 2"):
        create_task("ordinal", ["0", "1"])


def test_targets_are_standardized_for_the_loss_and_converted_back():
    data = dataset([0] * 4, [(1.0, 100.0), (2.0, 200.0), (3.0, 300.0), (6.0, 300.0)])
    task = create_task("regression", ["x", "y"]).fitted(data)
    assert task.mean == pytest.approx((3.0, 225.0)) and task.std == pytest.approx(
        (np.std([1, 2, 3, 6]), np.std([100, 200, 300, 300]))
    )
    outputs, labels = torch.zeros(2, 2), torch.tensor([[3.0, 225.0], [3.0 + task.std[0], 225.0]])
    assert float(task.loss(outputs, labels)) == pytest.approx(0.25)
    scores = create_task("regression", ["x", "y"], **task.state()).metrics(outputs, labels)
    assert scores["per_target"][0]["mae"] == pytest.approx(task.std[0] / 2)
    assert scores["per_target"][1]["mae"] == pytest.approx(0.0, abs=1e-9)
    assert scores["loss"] == pytest.approx(0.25)
    assert scores["per_target"][0]["r2"] == pytest.approx(-1.0)
    assert np.isnan(scores["per_target"][1]["r2"])
    assert scores["r2"] == pytest.approx(-1.0)


def test_equal_targets_have_no_spread_although_their_std_is_rounded():
    values = [(0.1, float(i)) for i in range(3)]
    assert np.std([0.1] * 3) > 0
    task = create_task("regression", ["x", "y"]).fitted(dataset([0] * 3, values))
    assert task.std[0] == 1.0
    scores = task.metrics(torch.ones(3, 2), torch.tensor(values, dtype=torch.float64))
    assert np.isnan(scores["per_target"][0]["r2"]) and scores["r2"] == scores["per_target"][1]["r2"]


def test_models_of_several_folds_are_averaged_in_target_units():
    first, second = RegressionTask(("x",), mean=(1.0,), std=(2.0,)), RegressionTask(("x",), mean=(3.0,), std=(4.0,))
    outputs = [torch.tensor([[1.0]]), torch.tensor([[0.5]])]  # 3 and 5
    assert first.numbers(first.average_outputs(outputs, [first, second])).item() == pytest.approx(4.0)
    tasks = [MultiLabelTask(("a",), thresholds=(t,)) for t in (0.2, 0.6)]
    ensemble = tasks[0].for_ensemble(tasks)
    assert ensemble.thresholds == pytest.approx((0.4,))


@pytest.mark.parametrize(
    "task", [MultiLabelTask(("a", "b", "c")), OrdinalTask(tuple("0123"))], ids=lambda task: task.name
)
def test_averaged_outputs_have_the_mean_probabilities(task):
    torch.manual_seed(0)
    outputs = [torch.randn(5, 3).double(), torch.randn(5, 3).double()]
    mean = (task.probabilities(outputs[0]) + task.probabilities(outputs[1])) / 2
    assert torch.allclose(task.probabilities(task.average_outputs(outputs)), mean)


def test_large_targets_keep_their_precision():
    data = dataset([0] * 3, [1.7e9, 1.7e9 + 1, 1.7e9 + 2])
    task = create_task("regression", ["t"]).fitted(data)
    values = task.standardized(torch.stack([task.encode(1.7e9 + i) for i in range(3)]))
    assert values[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])


def test_errors_of_targets_with_different_units_are_not_averaged_in_texts():
    several, one = RegressionTask(("weight_g", "length_m")), RegressionTask(("weight_g",))
    for name in ("epoch_format", "val_format", "test_format", "result_format"):
        assert "R²" in getattr(several, name) and "MAE" not in getattr(several, name)
        assert "MAE" in getattr(one, name)
    with pytest.raises(ValueError, match="monitor must be loss or r2 with several targets, got 'mae'"):
        RegressionTask(("weight_g", "length_m"), monitor="mae").fitted(None)


def test_a_regression_rejects_missing_targets():
    task = RegressionTask(("x", "y"))
    assert task.remap_labels(torch.tensor([1.0, 2.0]), [1, 0]).tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match="must have all targets of the run, got none for 'y'"):
        task.remap_labels(torch.tensor([1.0]), [0])


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (MultiLabelTask(("a", "b")), np.array([[1, 0], [1, 1], [0, 1], [0, 0]] * 10)),
        (OrdinalTask(tuple("012"), loss_name="corn"), np.array([0, 1, 2, 1] * 10)),
        (RegressionTask(("x", "y"), mean=(1.0, 0.0), std=(2.0, 1.0)), np.array([[1.0, 5.0], [3.0, 4.0]] * 20)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_fitted_linear_head_has_a_lower_loss_than_a_constant_head(task, labels):
    rng = np.random.default_rng(0)
    signal = labels.reshape(len(labels), -1).astype(float)
    features = np.concatenate([signal + 0.1 * rng.normal(size=signal.shape), rng.normal(size=(len(labels), 3))], 1)
    outputs = 2 if task.name != "regression" else signal.shape[1]
    weight, bias = task.fit_linear(features, labels, outputs)
    fitted = float(task.loss(torch.from_numpy(features) @ weight.T + bias, torch.from_numpy(labels)))
    constant = float(task.loss(torch.zeros(len(labels), outputs).double(), torch.from_numpy(labels)))
    assert fitted < 0.7 * constant


def test_averaged_ordinal_outputs_are_finite_for_many_ranks():
    task = OrdinalTask(tuple(map(str, range(60))), loss_name="corn")
    logits = torch.full((2, 59), -9.0)
    mean = task.average_outputs([logits, logits])
    assert mean.isfinite().all()
    torch.testing.assert_close(task.probabilities(mean), task.probabilities(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("present", [(0, 2, 3), (0, 1), (1, 2), (2, 3)])
def test_a_linear_head_predicts_no_rank_without_images(present):
    task = OrdinalTask(("a", "b", "c", "d"))
    labels = np.repeat(present, 30)
    features = np.eye(4)[labels] * 3 + np.random.default_rng(0).normal(0, 0.1, (len(labels), 4))
    weight, bias = task.fit_linear(features, labels, 3)
    scores = task.metrics(torch.from_numpy(features) @ weight.T + bias, labels)
    assert scores["accuracy"] == 1.0


def test_an_undefined_metric_ranks_epochs_by_their_loss():
    task = RegressionTask(("age",), monitor="r2")
    rows = [{"val_r2": math.nan, "val_loss": loss} for loss in (2.0, 1.0, 3.0)]
    assert max(rows, key=task.selection_score) == rows[1]


def test_class_weights_of_zero_are_rejected():
    with pytest.raises(
        ValueError, match=r"class_weights must .*: at least one weight must be above 0, got 0 for all 2"
    ):
        resolve_class_weights({"a": 0, "b": 0.0}, ("a", "b"), (1, 1))


def test_names_with_a_comma_can_be_quoted_in_an_order():
    classes = ["none, mild", "severe"]
    assert rank_order(classes, '"none, mild", severe') == classes

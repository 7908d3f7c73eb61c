import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from snella_app.tasks import ClassificationTask


def test_the_loss_matches_hand_computed_cross_entropy():
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0, 2])
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    assert torch.allclose(ClassificationTask(("a", "b", "c")).loss(logits, labels), -(log_p[0, 0] + log_p[1, 2]) / 2)
    smoothed = ClassificationTask(("a", "b", "c"), 0.3).loss(logits, labels)
    q = torch.full((2, 3), 0.1, dtype=torch.float64)
    q[0, 0] += 0.7
    q[1, 2] += 0.7
    assert torch.allclose(smoothed, -(q * log_p).sum(1).mean())


def test_the_loss_of_half_precision_logits_is_float32():
    loss = ClassificationTask(("a", "b")).loss(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([1]))
    assert loss.dtype == torch.float32


def test_a_batch_stacks_images_and_labels():
    batch = ClassificationTask(("a", "b")).collate([(torch.zeros(3, 4, 4), 1), (torch.ones(3, 4, 4), 0)])
    assert batch["images"].shape == (2, 3, 4, 4)
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.long


def test_metrics_match_scikit_learn():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 3), torch.randint(0, 3, (50,))
    result = ClassificationTask(("a", "b", "c")).metrics(logits, labels)
    predicted = logits.argmax(1)
    assert result["accuracy"] == pytest.approx(float((predicted == labels).float().mean()))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert sum(map(sum, result["confusion"])) == 50
    assert result["confusion"][1][2] == int(((labels == 1) & (predicted == 2)).sum())
    assert result["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))


@pytest.mark.parametrize(
    ("monitor", "text"),
    [
        ("accuracy", "validation 0.9000, test 0.8000 (balanced 0.4000)"),
        ("balanced_accuracy", "validation 0.9000 (balanced 0.5000), test 0.8000 (balanced 0.4000)"),
        ("macro_f1", "validation 0.9000 (macro F1 0.4500), test 0.8000 (balanced 0.4000)"),
    ],
)
def test_the_last_line_shows_the_monitored_metric(monitor, text):
    val = {"accuracy": 0.9, "balanced_accuracy": 0.5, "macro_f1": 0.45}
    assert (
        ClassificationTask(("a", "b"), monitor=monitor).final_text(val, {"accuracy": 0.8, "balanced_accuracy": 0.4})
        == text
    )


def test_a_class_without_images_does_not_affect_the_balanced_accuracy():
    logits = torch.eye(3)[[0, 0, 2]]
    result = ClassificationTask(("a", "b", "c")).metrics(logits, [0, 0, 1])
    assert result["confusion"] == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert result["balanced_accuracy"] == 0.5


def test_metrics_do_not_depend_on_label_smoothing():
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    assert ClassificationTask(("a", "b"), 0.5).metrics(logits, labels) == ClassificationTask(("a", "b")).metrics(
        logits, labels
    )


def test_a_single_class_is_rejected():
    with pytest.raises(ValueError, match=r"classes must have at least 2 entries, got \['a'\]"):
        ClassificationTask(("a",))


def test_logits_without_labels_are_rejected():
    with pytest.raises(ValueError, match="the same length of at least 1, got 2 and 3"):
        ClassificationTask(("a", "b")).metrics(torch.zeros(2, 2), [0, 1, 1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        ClassificationTask(("a", "b")).metrics(torch.zeros(0, 2), [])

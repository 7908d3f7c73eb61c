"""Losses compared with their formulas and with each other."""

import math

import pytest
import torch
import torch.nn.functional as F

from snella_app.tasks import ClassificationTask, MultiLabelTask, OrdinalTask, RegressionTask
from snella_app.tasks.classification import corn, corn_probabilities, focal, predicted_ranks
from snella_app.tasks.multilabel import binary_focal

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def test_the_focal_loss_matches_its_formula():
    p = LOGITS.softmax(1)
    expected = torch.stack([-((1 - p[0, 0]) ** 2) * p[0, 0].log(), -((1 - p[1, 2]) ** 2) * p[1, 2].log()])
    assert torch.allclose(focal(LOGITS, LABELS), expected)
    uniform = torch.stack([focal(LOGITS, torch.full((2,), label)) for label in range(3)]).mean(0)
    assert torch.allclose(focal(LOGITS, LABELS, 0.3), 0.7 * expected + 0.3 * uniform)


def test_the_logit_adjustment_adds_log_priors():
    priors = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    task = ClassificationTask(tuple("abc"), loss_name="logit-adjusted", log_priors=tuple(priors.log().tolist()))
    weighted = LOGITS.exp() * priors
    expected = -(weighted / weighted.sum(1, keepdim=True)).log()[[0, 1], LABELS]
    assert torch.allclose(task.loss(LOGITS, LABELS), expected.mean())


@pytest.mark.parametrize("name", ClassificationTask.losses)
def test_mixed_labels_have_the_mixed_loss(name):
    task = ClassificationTask(tuple("abc"), loss_name=name, log_priors=(-0.7, -1.2, -1.6))
    mixed = 0.3 * F.one_hot(LABELS, 3) + 0.7 * F.one_hot(torch.tensor([1, 0]), 3)
    parts = [task.loss(LOGITS, labels) for labels in (LABELS, torch.tensor([1, 0]))]
    assert torch.allclose(task.loss(LOGITS, mixed.double()), 0.3 * parts[0] + 0.7 * parts[1])


def test_the_binary_focal_loss_matches_its_formula():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    p = LOGITS.sigmoid()
    losses = -(labels * (1 - p) ** 2 * p.log() + (1 - labels) * p**2 * (1 - p).log())
    assert torch.allclose(binary_focal(LOGITS, labels), losses)
    weights = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    assert torch.allclose(binary_focal(LOGITS, labels, weights), losses * torch.where(labels > 0, weights, 1.0))


def test_corn_uses_only_the_conditional_outputs_of_a_sample():
    z = torch.tensor([[0.3, -0.2], [0.3, -0.2], [0.3, -0.2]], dtype=torch.float64)
    losses = corn(z, torch.tensor([0, 1, 2]))
    up, down = -F.logsigmoid(z[0]), -F.logsigmoid(-z[0])
    assert torch.allclose(losses, torch.stack([down[0], up[0] + down[1], up[0] + up[1]]) / 2)


def test_corn_probabilities_are_products_of_conditional_probabilities():
    p = corn_probabilities(torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64))
    assert torch.allclose(p, torch.tensor([[0.5, 0.125, 0.375]], dtype=torch.float64))
    assert predicted_ranks(torch.tensor([[0.5, 0.125, 0.375], [0.49, 0.125, 0.385], [0.3, 0.1, 0.6]])).tolist() == [
        0,
        1,
        2,
    ]


def test_class_and_sample_weights_multiply_the_loss():
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    task = ClassificationTask(("a", "b", "c"), weight_by_class=(2.0, 1.0, 0.5))
    assert torch.allclose(task.loss(LOGITS, LABELS), (2 * losses[0] + 0.5 * losses[1]) / 2)
    sample_weights = torch.tensor([3.0, 0.0])
    assert torch.allclose(task.loss(LOGITS, LABELS, sample_weights), 6 * losses[0] / 2)
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    soft = F.cross_entropy(LOGITS, mixed, reduction="none")
    assert torch.allclose(task.loss(LOGITS, mixed), (1.5 * soft[0] + 0.5 * soft[1]) / 2)


@pytest.mark.parametrize(
    ("task", "outputs", "labels"),
    [
        (ClassificationTask(("a", "b", "c"), loss_name="focal"), LOGITS, LABELS),
        (MultiLabelTask(("a", "b", "c")), LOGITS, torch.tensor([[1.0, 0, 1], [0, 0, 0]])),
        (OrdinalTask(tuple("0123"), loss_name="corn"), LOGITS, torch.tensor([3, 1])),
        (RegressionTask(("x", "y", "z"), mean=(1.0, 2, 3), std=(2.0, 2, 2)), LOGITS, torch.randn(2, 3).double()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_loss_has_a_correct_gradient_and_float32_for_half_precision(task, outputs, labels):
    assert torch.autograd.gradcheck(
        lambda z: task.loss(z, labels, torch.tensor([1.0, 2.0])), outputs.clone().requires_grad_()
    )
    half = task.loss(outputs.bfloat16(), labels)
    assert half.dtype in (torch.float32, torch.float64)
    assert float(half) == pytest.approx(float(task.loss(outputs, labels)), rel=0.02)

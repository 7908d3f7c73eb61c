import math

import pytest
import torch

from snella_lab.recipes.dreambooth.evaluate import vendi_score


def test_identical_embeddings_count_as_one_image():
    assert vendi_score(torch.ones(5, 3)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_orthogonal_embeddings_count_separately(count):
    assert vendi_score(3.0 * torch.eye(count, 9)) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize("degrees", [10.0, 60.0, 90.0])
def test_vendi_score_of_two_embeddings_matches_the_formula(degrees):
    cosine = math.cos(math.radians(degrees))
    # K / 2 has the eigenvalues (1 ± cos) / 2
    probs = [(1 + cosine) / 2, (1 - cosine) / 2]
    expected = math.exp(-sum(p * math.log(p) for p in probs))
    pair = torch.tensor([[2.0, 0.0], [5.0 * cosine, 5.0 * math.sin(math.radians(degrees))]], dtype=torch.float64)
    assert vendi_score(pair) == pytest.approx(expected, rel=1e-12)


def test_two_pairs_of_duplicates_count_as_two():
    duplicates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert vendi_score(duplicates) == pytest.approx(2.0, rel=1e-12)

"""NOAH: supernet, search and selected subnet."""

import dataclasses
import re
from random import Random

import pytest
import torch
from torch import nn

from snella_app.methods import SelectionData, build_method, spec_of
from snella_lab.methods.noah import (
    Subnet,
    SubnetSpace,
    SuperAdapter,
    SuperLowRank,
    _apply,
    activate,
    build_supernet,
    search_subnet,
    space_of,
)
from snella_lab.methods.spt import LowRank

SPACE = SubnetSpace((8, 8, 8, 8), (32, 32, 32, 32), (1, 2, 4), budget=400)
QUICK = {"sizes": [1, 2], "supernet_epochs": 1, "population": 4, "generations": 1}


def search(score, space=SPACE, seed=0, **options):
    settings = {"population": 12, "generations": 6, "report": lambda text: None, **options}
    return search_subnet(space, score, Random(seed), **settings)


def test_the_parameters_of_a_combination_are_counted_by_the_formula():
    subnet = Subnet((2, 1, 0, 0), (4, 0, 0, 0), (1, 1, 1, 0))
    assert SPACE.count(subnet) == 3 * 8 + 4 * 32 + 3 * (2 * 8 + 1 + 8)
    assert SPACE.smallest() == Subnet((1, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0, 0))


@pytest.mark.parametrize(("blocks", "depths"), [(12, [3, 6, 9, 12]), (5, [2, 3, 4, 5]), (2, [1, 2]), (1, [1])])
def test_depths_are_quarters_of_the_number_of_blocks(blocks, depths):
    assert SubnetSpace((8,) * blocks, (32,) * blocks, (1,), 0).depths == depths


def test_candidates_mutants_and_crossovers_fill_the_first_blocks_with_allowed_sizes():
    draw = Random(1)
    parents = [SPACE.sample(draw) for _ in range(20)]
    children = [SPACE.mutate(p, draw) for p in parents] + [SPACE.cross(*parents[:2], draw) for _ in range(5)]
    for subnet in parents + children:
        for sizes in subnet:
            depth = sum(size > 0 for size in sizes)
            assert depth in SPACE.depths and set(sizes[:depth]) <= {1, 2, 4} and not any(sizes[depth:])
    assert children[:20] != parents


def test_evolution_improves_on_the_random_population_within_the_budget():
    def score(subnet):
        measured.append(subnet)
        return float(sum(subnet.prompts) - sum(subnet.ranks)), 0.0

    measured = []
    best = search(score)
    assert SPACE.count(best) <= 400
    assert score(best)[0] == max(score(s)[0] for s in set(measured)) > max(score(s)[0] for s in measured[:12])
    assert all(SPACE.count(subnet) <= 400 for subnet in measured)


def test_no_candidate_is_evaluated_twice_and_ties_select_the_smallest():
    measured = []
    best = search(lambda subnet: measured.append(subnet) or (0.5, 0.0))
    assert len(set(measured)) == len(measured) > 12
    assert best == SPACE.smallest()


def test_equal_seeds_give_equal_search_results():
    score = lambda subnet: (float(sum(subnet.widths)), 0.0)  # noqa: E731
    assert search(score, seed=3) == search(score, seed=3)


def test_the_search_ends_when_no_candidate_fits_the_budget():
    messages = []
    space = dataclasses.replace(SPACE, budget=SPACE.count(SPACE.smallest()))
    assert search(lambda subnet: (0.0, 0.0), space, report=messages.append) == SPACE.smallest()
    assert messages[-1] == "noah: no candidates left with at most 65 parameters"


def test_a_supernet_matches_the_subnet_of_its_leading_slices(make_model, images):
    model = make_model().requires_grad_(False)
    supernet = build_supernet(model, "head", 4).eval()
    torch.manual_seed(1)
    for parameter in supernet.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    blocks = len(supernet.blocks)
    none = (0,) * blocks
    with torch.no_grad():
        activate(supernet, Subnet(none, none, none))
        plain = make_model().eval()
        plain.head.load_state_dict(supernet.head.state_dict())
        torch.testing.assert_close(supernet(images), plain(images))
        x = torch.randn(2, 3, 64)
        low_rank, adapter = SuperLowRank(5, 64, 4), SuperAdapter(64, 4)
        small = LowRank(5, 64, 2)
        nn.init.normal_(low_rank.B)
        low_rank.active = 2
        small.A.copy_(low_rank.A[:2])
        small.B.copy_(low_rank.B[:, :2])
        torch.testing.assert_close(low_rank.update(x), small.update(x))
        nn.init.normal_(adapter.up.weight)
        adapter.active = 4
        torch.testing.assert_close(adapter(x), x + adapter.bottleneck(x))
        adapter.active = 0
        assert adapter(x) is x


def test_a_built_model_matches_the_supernet_with_the_same_combination(make_model, images):
    torch.manual_seed(1)
    supernet = build_supernet(make_model().requires_grad_(False), "head", 4).eval()
    for parameter in supernet.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    subnet = Subnet((2, 4, 1, 0, 0, 0), (4, 2, 2, 1, 0, 0), (1, 2, 3, 4, 4, 2))
    activate(supernet, subnet)
    built = _apply(make_model().requires_grad_(False), "head", subnet).eval()
    with torch.no_grad():
        large = dict(supernet.named_parameters())
        for name, parameter in built.named_parameters():
            if parameter.requires_grad:
                source = large[name]
                parameter.copy_(source[tuple(slice(size) for size in parameter.shape)])
        outputs = built(images)
        torch.testing.assert_close(supernet(images), outputs)
        activate(supernet, Subnet(*((0,) * 6,) * 3))
        assert not torch.allclose(supernet(images), outputs, atol=1e-2)


def test_the_model_gets_fresh_modules_within_the_budget(make_model, batches):
    model = make_model()
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    torch.manual_seed(2)
    built = build_method("noah", model, batches=batches, budget=0.003, **QUICK)
    of_head = set(built.head.parameters())
    added = sum(p.numel() for p in built.parameters() if p.requires_grad and p not in of_head)
    assert 0 < added <= 3000
    assert all(torch.equal(value, head[name]) for name, value in built.head.state_dict().items())
    model = make_model()
    torch.manual_seed(2)
    again = build_method("noah", model, batches=batches, budget=0.003, **QUICK)
    assert again.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), built.parameters(), strict=True))
    assert spec_of(built).family == "noah"


def test_the_default_budget_is_scaled_to_the_backbone_and_never_below_the_smallest_combination(make_model):
    space = space_of(make_model(), "head", {})
    assert space.sizes == (5, 10, 50, 100)
    assert space.budget == space.count(space.smallest())
    assert space_of(make_model(), "head", {"sizes": [1]}).budget > dataclasses.replace(space, budget=0).budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0001, "sizes": [1]}, r"budget must be at least 0.00\d+ million .*sizes=\[1\], got 0.0001"),
        ({"budget": 1, "sizes": [1502]}, r"budget must be at least 1.348924 million .*, got 1"),
        ({"sizes": []}, r"sizes must be a list of integers of at least 1, got \[\]"),
        ({"sizes": [0, 5]}, r"sizes must be .*, got \[0, 5\]"),
        ({"sizes": [True]}, r"sizes must be .*, got \[True\]"),
        ({"population": 1}, "population must be an integer of at least 2, got 1"),
    ],
)
def test_options_out_of_range_are_rejected(options, message, make_model, batches):
    with pytest.raises(ValueError, match=message):
        build_method("noah", make_model(), batches=batches, **options)


def test_noah_requires_validation_images(make_model, batches):
    with pytest.raises(ValueError, match="method 'noah' requires validation images for its search, got none"):
        build_method("noah", make_model(), batches=batches.train)
    with pytest.raises(ValueError, match=r"validation must yield at least one batch .* got none"):
        build_method("noah", make_model(), batches=SelectionData(batches.train, lambda: iter([])), **QUICK)


def test_noah_requires_training_images_and_a_finite_loss(make_model, batches):
    with pytest.raises(ValueError, match=r"batches\(\) must yield at least one batch .* got none"):
        build_method("noah", make_model(), batches=SelectionData(lambda: iter([]), batches.validation), **QUICK)
    broken = SelectionData(batches.train, batches.validation, loss=lambda outputs, labels: outputs.sum() * torch.nan)
    with pytest.raises(ValueError, match=r"supernet is nan in epoch 1; reduce supernet_lr, now 0.0005"):
        build_method("noah", make_model(), batches=broken, **QUICK)


def test_a_block_without_a_fused_qkv_layer_is_rejected(make_model, batches):
    model = make_model()
    model.blocks[1].attn.qkv = nn.Identity()
    with pytest.raises(
        ValueError, match=r"'noah' cannot be applied .*blocks.1.attn.qkv must be a linear layer, got Identity"
    ):
        build_method("noah", model, batches=batches)


def test_candidates_of_a_task_without_class_scores_are_reported_by_their_loss(make_model, batches):
    messages = []
    data = SelectionData(
        batches.train, batches.validation, lambda outputs, labels: outputs.square().mean() + 1, messages.append, False
    )
    build_method("noah", make_model(), batches=data, **QUICK)
    assert re.search(r"best loss 1\.\d{4} with [\d,]+ parameters", messages[-1])

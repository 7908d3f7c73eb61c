"""Distributed training with two processes: DDP, FSDP1 and FSDP2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from tests.processes import run_in_two_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
SIZES = {"0": 120, "2.attn.in_proj.q": 144, "2.attn.in_proj.k": 144, "2.attn.in_proj.v": 144}
SIZES |= {"2.attn.out_proj": 144, "2.fc": 144}
IMPLS = ["eager", *(["numba"] if importlib.util.find_spec("numba") else [])]
CASES = [f"{kind}-{impl}" for kind in ("ddp", "fsdp1", "fsdp2") for impl in IMPLS]
REJECTED = {
    "fsdp1-eager-delta_magnitude": "NotImplementedError: importance='delta_magnitude'",
    "fsdp2-eager-delta_magnitude": "NotImplementedError: importance='delta_magnitude'",
    "pieces": "NotImplementedError: BudgetAllocator requires one copy of the 3 factor entries over all 2 processes, "
    "got 6",
}
UNITS = ("root", "norms", "layers", "blocks")
EQUALLY_ROUNDED = {"FULL_SHARD-layers", "SHARD_GRAD_OP-norms", "SHARD_GRAD_OP-layers", "NO_SHARD-layers", "FSDP2-root"}
"""Cases whose sharded model compresses the same normalizations as the unsharded model."""
RESUMED = [f"{kind}-resume" for kind in ("ddp", "fsdp1", "fsdp2")]
RECOMPUTED = [f"{kind}-{units}" for kind in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "FSDP2") for units in UNITS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the output of both processes for every case."""
    worker = Path(__file__).with_name("distributed_worker.py")
    return run_in_two_processes(worker, tmp_path_factory.mktemp("ranks"), *CASES, *REJECTED, *RESUMED, timeout=200)


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_equal_budgets_and_weights(runs, case):
    first, second = (run[case] for run in runs)
    assert first == second
    assert "error" not in first, first
    assert len(first["history"]) == 5
    assert list(first["history"][-1]["budgets"]) == list(SIZES)
    assert first["history"][-1]["budgets"] == first["nonzeros"]
    assert sum(first["nonzeros"].values()) == sum(SIZES.values()) - round(0.7 * sum(SIZES.values()))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("ddp-eager")])
def test_sharded_training_equals_ddp(runs, case):
    expected, result = runs[0]["ddp-eager"], runs[0][case]
    assert "error" not in result, result
    for actual, reference in zip(result["history"], expected["history"], strict=True):
        assert actual["importance"] == pytest.approx(reference["importance"], rel=1e-2, abs=1e-12)
        # differently rounded importance may move an entry between matrices
        assert actual["budgets"] == pytest.approx(reference["budgets"], abs=2)
    assert result["digest"] == pytest.approx(expected["digest"], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_distributed_evaluation_equals_single_device(runs, case):
    assert runs[0][case]["evaluation_error"] < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_optimizer_groups_do_not_depend_on_sharding(runs, case):
    groups = runs[0][case]["groups"]
    assert groups == runs[0]["ddp-eager"]["groups"]
    assert (groups["head"], groups["head_no_decay"]) == (1, 1)  # the weight and bias of the linear layer "3"


@pytest.mark.parametrize("case", RESUMED)
def test_training_resumed_from_a_full_state_equals_uninterrupted_training(runs, case):
    for run in runs:
        assert isinstance(run[case], list), run[case]
        uninterrupted, resumed = run[case]
        assert len(uninterrupted["history"]) == 5
        assert resumed == uninterrupted


@pytest.mark.parametrize("case", REJECTED)
def test_unsupported_sharding_raises_with_alternatives(runs, case):
    assert runs[0][case]["error"].startswith(REJECTED[case])
    assert "DDP" in runs[0][case]["error"]


@pytest.fixture(scope="module")
def gradient_errors(tmp_path_factory):
    """Return the largest gradient error of both processes by case."""
    worker, folder = Path(__file__).with_name("recompute_worker.py"), tmp_path_factory.mktemp("recompute")
    cases = [f"{case}-{variant}" for case in RECOMPUTED for variant in ("exact", "compressed")]
    return run_in_two_processes(worker, folder, *cases, timeout=200)


@pytest.mark.parametrize("case", RECOMPUTED)
def test_inputs_are_recomputed_from_sharded_normalizations(gradient_errors, case):
    for errors in gradient_errors:
        assert errors[f"{case}-exact"] == 0
        # the input of a normalization with sharded parameters is saved in full precision
        error = errors[f"{case}-compressed"]
        assert error == 0 if case in EQUALLY_ROUNDED else 0 < error < 0.01


def test_deepspeed_optimizer_raises():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SnellaConfig(r=2, target_modules=["0"]))
    allocator = BudgetAllocator(model, total_epochs=1, steps_per_epoch=1)
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    wrapper = type("Wrapper", (torch.optim.SGD,), {})(model.parameters(), lr=0.1)  # wrapped by Accelerate
    wrapper.optimizer = kind()
    for optimizer in (kind(), wrapper):
        with pytest.raises(NotImplementedError, match=r"DeepSpeedZeroOptimizer.*DDP or FSDP"):
            allocator.attach(optimizer)


def test_replaced_optimizer_parameters_raise_at_first_step():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SnellaConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    BudgetAllocator(model, total_epochs=1, steps_per_epoch=1).attach(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    # like deepspeed.initialize: the optimizer updates a flat float32 copy
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]]).requires_grad_()
        group["params"] = [flat]
    with pytest.raises(
        NotImplementedError, match=r"the parameters of SGD were replaced after attach .*deepspeed.initialize"
    ):
        optimizer.step()


def test_torch_distributed_checkpoint_restores_the_allocator():
    def prepare():
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SnellaConfig(r=2, target_modules=["0"]))
        optimizer = create_snella_optimizer(model, lr=0.1)
        return model, optimizer, BudgetAllocator(model, total_epochs=4, steps_per_epoch=1).attach(optimizer)

    model, optimizer, allocator = prepare()
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    other, other_optimizer, resumed = prepare()
    set_state_dict(other, other_optimizer, model_state_dict=weights, optim_state_dict=state)
    assert resumed.step == 2
    assert resumed.history == allocator.history
    assert resumed.importance.scores() == allocator.importance.scores()

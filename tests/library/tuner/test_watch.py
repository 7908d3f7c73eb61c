"""Warnings about silent training mistakes."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from snella import BudgetAllocator, SnellaConfig
from snella.matrices import adapted_matrices
from snella.watch import is_newly_initialized


def train(case, model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    for _ in range(steps):
        case.run(model).square().sum().backward()
        optimizer.step()


def test_missing_allocator_warns_once(mlp):
    model = mlp.adapted(target_sparsity=0.6)
    with pytest.warns(UserWarning) as records:
        train(mlp, model, 30)
    assert len(records) == 1
    message = str(records[0].message)
    assert "target_sparsity=0.6 is set, but after 2 optimizer steps no budget allocator is attached" in message
    assert "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer)" in message
    assert "callbacks=[SnellaCallback()]" in message


def attached(model):
    """Return an allocator that is attached to an optimizer of the model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return BudgetAllocator(model, total_epochs=1, steps_per_epoch=4).attach(optimizer)


def test_no_allocator_is_attached_to_copies_of_a_model(mlp, tmp_path):
    model = mlp.adapted()
    allocator = attached(model)
    config = model.peft_config["default"]
    torch.save(config, tmp_path / "config.pt")
    assert not torch.load(tmp_path / "config.pt", weights_only=False).watch.is_attached
    assert not copy.deepcopy(model).peft_config["default"].watch.is_attached
    assert list(config.watch.allocators) == [allocator]


def test_missing_allocator_warns_after_another_one_was_collected(mlp):
    model = mlp.adapted()
    attached(model)  # the optimizer and its hooks are collected, too
    gc.collect()
    with pytest.warns(UserWarning, match="after 2 optimizer steps no budget allocator is attached"):
        train(mlp, model, 2)


def test_training_a_merged_adapter_warns(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.merge_adapter()
    BudgetAllocator(model, total_epochs=1, steps_per_epoch=4).attach(optimizer)
    with pytest.warns(UserWarning, match=r"the adapter is merged, so it is not trained; call unmerge_adapter\(\)"):
        optimizer.step()


def test_adapters_whose_names_begin_alike_are_not_mistaken(mlp, tmp_path, recwarn):
    model = get_peft_model(mlp.base(), mlp.config(), adapter_name="task")
    model.add_adapter("task2", mlp.config())
    model.save_pretrained(tmp_path, selected_adapters=["task2"])
    model.load_adapter(tmp_path / "task2", "task2")
    assert not [str(warning.message) for warning in recwarn if "not their budgets" in str(warning.message)]


def test_state_dict_without_budgets_warns(mlp):
    model, restored = mlp.adapted(), mlp.adapted()
    BudgetAllocator(model, total_epochs=1, steps_per_epoch=1).advance_to(1)
    factors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.warns(UserWarning, match=r"factors of adapter 'default' but not their budgets \(snella_budget\)"):
        restored.load_state_dict(factors, strict=False)
    complete = {name: value for name, value in model.state_dict().items() if "snella_" in name}
    restored.load_state_dict(complete, strict=False)
    restored.load_state_dict({}, strict=False)
    assert [matrix.budget for matrix in adapted_matrices(restored)] == [m.budget for m in adapted_matrices(model)]
    dense = mlp.adapted(target_sparsity=0.0)
    dense.load_state_dict({name: p for name, p in dense.named_parameters() if p.requires_grad}, strict=False)


def test_warning_occurs_at_second_step(mlp):
    model = mlp.adapted()
    train(mlp, model, 1)
    with pytest.warns(UserWarning, match="after 2 optimizer steps no budget allocator is attached"):
        train(mlp, model, 1)


def test_saving_after_one_step_without_allocator_warns(mlp, tmp_path):
    untrained, model = mlp.adapted(), mlp.adapted()
    train(mlp, model, 1)
    untrained.save_pretrained(tmp_path / "untrained")
    with pytest.warns(UserWarning, match="after 1 optimizer step no budget allocator is attached"):
        model.save_pretrained(tmp_path / "trained")


def test_adapter_at_target_trains_without_allocator(mlp, tmp_path):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    BudgetAllocator(model, total_epochs=1, steps_per_epoch=1).attach(optimizer)
    model.train()
    mlp.run(model).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path, is_trainable=True)
    train(mlp, loaded, 3)


def test_steps_of_another_optimizer_do_not_end_the_check(mlp):
    model = mlp.adapted()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for _ in range(30):
        other.step()
    with pytest.warns(UserWarning, match="no budget allocator is attached"):
        train(mlp, model, 2)


def test_update_and_allocate_counts_as_attached(mlp):
    model = mlp.adapted(zero_init_ema=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    allocator = BudgetAllocator(model, total_epochs=2, steps_per_epoch=2)
    for number in range(1, 5):
        mlp.run(model.train()).square().sum().backward()
        optimizer.step()
        allocator.update_and_allocate(number)


class Classifier(nn.Module):
    """Backbone with trained-looking weights and a new head."""

    def __init__(self, head) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 64), head

    def forward(self, x):
        return self.head(self.body(x).tanh())


def make_head(weight, bias=0.0):
    """Create a head with an initializer for the weight and a constant bias."""
    head = nn.Linear(64, 10)
    torch.manual_seed(0)
    weight(head.weight)
    nn.init.constant_(head.bias, bias)
    return head


def two_steps(head, **settings):
    """Run two training steps without an allocator, at constant sparsity."""
    torch.manual_seed(0)
    model = get_peft_model(
        Classifier(head), SnellaConfig(r=2, init_sparsity=0.7, target_modules=["body"], **settings)
    ).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    return model


NEW_HEADS = {
    "torch": lambda: nn.Linear(64, 10),
    "timm": lambda: make_head(lambda w: nn.init.trunc_normal_(w, std=0.02)),
    "transformers": lambda: make_head(lambda w: nn.init.normal_(w, std=0.02)),
    "xavier": lambda: make_head(nn.init.xavier_uniform_),
    "zeros": lambda: make_head(nn.init.zeros_),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 10, 1), nn.Flatten()),
}


@pytest.mark.parametrize("kind", NEW_HEADS)
def test_frozen_new_head_warns_at_second_step_and_removes_hooks(kind):
    name = "head.1" if kind == "convolution" else "head"
    message = rf"newly initialized head layers are frozen.* modules_to_save=\['{name}'\]"
    with pytest.warns(UserWarning, match=message) as records:
        model = two_steps(NEW_HEADS[kind]())
    assert len(records) == 1
    assert not [m for m in model.modules() if m._forward_hooks]


def trained_head():
    head, x = nn.Linear(64, 10), torch.randn(32, 64)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    nn.functional.cross_entropy(head(x), torch.arange(32) % 10).backward()
    optimizer.step()
    return head.requires_grad_(False)


def text_embeddings():
    """Zero-shot classifier, like CLIP's: zero bias and correlated rows."""
    head = make_head(nn.init.normal_)
    with torch.no_grad():
        head.weight.add_(torch.randn(64)).div_(head.weight.norm(dim=1, keepdim=True))
    return head


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (trained_head, {}),
        (text_embeddings, {}),
        (nn.Identity, {}),
        (lambda: nn.Linear(64, 10), {"modules_to_save": ["head"]}),
    ],
    ids=["trained", "zero-shot", "none", "saved"],
)
def test_trained_heads_do_not_warn(make, settings):
    two_steps(make(), **settings)


def test_unused_new_head_does_not_warn():
    class Features(Classifier):
        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    config = SnellaConfig(r=2, init_sparsity=0.7, target_modules=["body"])
    model = get_peft_model(Features(nn.Linear(64, 10)), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()


def test_trained_weights_do_not_look_newly_initialized():
    torch.manual_seed(0)
    assert not is_newly_initialized(torch.randn(10, 64) + torch.randn(64), torch.zeros(10))  # correlated rows
    assert not is_newly_initialized(torch.randn(10, 640) * torch.linspace(1, 2, 10)[:, None], torch.zeros(10))
    assert not is_newly_initialized(torch.randn(10, 64) + 0.5, torch.zeros(10))
    assert not is_newly_initialized(torch.randn(10, 64), torch.full((10,), 1e-4))
    assert not is_newly_initialized(torch.randn(10, 64), None)
    assert not is_newly_initialized(torch.randn(10, 64, device="meta"), None)
    assert not is_newly_initialized(torch.ones(10, 64, dtype=torch.int8), None)
    assert not is_newly_initialized(torch.zeros(0, 64), None)
    assert not is_newly_initialized(torch.zeros(64), None)
    assert not is_newly_initialized(nn.Linear(8, 3).weight, None)  # too few entries
    assert is_newly_initialized(nn.Linear(64, 10, bias=False).bfloat16().weight, None)


@pytest.mark.parametrize(
    "settings", [{"target_sparsity": 0.0}, {"target_sparsity": 0.5, "init_sparsity": 0.5}], ids=["dense", "constant"]
)
def test_constant_sparsity_does_not_warn(mlp, settings):
    train(mlp, mlp.adapted(**settings), 15)


def test_attached_allocator_does_not_warn(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    BudgetAllocator(model, total_epochs=3, steps_per_epoch=5).attach(optimizer)
    train(mlp, model, 15)


def test_frozen_adapters_and_evaluation_do_not_warn(mlp):
    model = mlp.adapted()
    model.base_model.set_requires_grad("default", False)
    other = mlp.adapted()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for _ in range(15):
        mlp.run(model.train())
        mlp.run(other.eval())
        optimizer.step()


class PartlyUsed(nn.Module):
    """Model that calls one layer, reads the weight of another, and leaves two unused."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.spare, self.other = (nn.Linear(4, 4) for _ in range(4))
        self.attn = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = nn.functional.linear(self.called(x), self.read.weight)
        return self.attn(x, x, x)[0]


TARGETS = ["called", "read", "spare", "other", "attn"]
UNUSED = (
    r"2 of 6 adapted modules were not used before the first optimizer step: 'spare', 'other'; the model neither called"
)


def make_partly_used(inject=get_peft_model, **settings):
    settings = {"r": 2, "init_sparsity": 0.3, "target_sparsity": 0.3, "target_modules": TARGETS} | settings
    return inject(PartlyUsed(), SnellaConfig(**settings))


def step(model, optimizer=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=1e-3)
    model.train()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("in_place", [False, True], ids=["peft_model", "injected"])
def test_unused_layers_are_reported_once_after_first_step(compiled, in_place):
    model = (
        make_partly_used(lambda model, config: inject_adapter_in_model(config, model))
        if in_place
        else make_partly_used()
    )
    with pytest.warns(UserWarning, match=UNUSED) as records:
        optimizer = step(torch.compile(model, backend="eager") if compiled else model)
    assert len(records) == 1
    step(model, optimizer)


def test_allocator_does_not_report_unused_layers_again():
    model = make_partly_used(target_sparsity=0.6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    BudgetAllocator(model, total_epochs=2, steps_per_epoch=2).attach(optimizer)
    with pytest.warns(UserWarning, match=UNUSED) as records:
        step(model, optimizer)
    assert len(records) == 1


def test_steps_of_other_optimizers_do_not_warn():
    other, model = nn.Linear(4, 4), make_partly_used()
    step(other)
    with pytest.warns(UserWarning, match=UNUSED):
        step(model)


def test_optimizer_state_initialization_is_not_a_training_step():
    model = make_partly_used()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    get_state_dict(model, optimizer)  # runs a step with learning rate 0 to create the optimizer's state
    assert optimizer.state
    with pytest.warns(UserWarning, match=UNUSED):
        step(model, optimizer)


def test_merging_reports_unused_layers(tmp_path):
    model, x = make_partly_used(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=UNUSED):
        step(model)
    model.save_pretrained(tmp_path)
    message = r"has not used the updates of 2 of 6 merged modules so far: 'spare', 'other'"
    with pytest.warns(UserWarning, match=message):
        copy.deepcopy(model).merge_and_unload()
    with pytest.warns(UserWarning, match=message):
        model.merge_adapter()
    loaded = PeftModel.from_pretrained(PartlyUsed(), tmp_path)
    copy.deepcopy(loaded).unload()
    with pytest.warns(UserWarning, match=message.replace("so far", "in training")):
        copy.deepcopy(loaded).merge_and_unload()  # only ran in another process
    loaded.save_pretrained(tmp_path / "again")
    assert SnellaConfig.from_pretrained(tmp_path / "again").unused_modules == ["spare", "other"]
    fresh = make_partly_used()
    fresh.save_pretrained(tmp_path / "fresh")
    assert SnellaConfig.from_pretrained(tmp_path / "fresh").unused_modules is None
    fresh.merge_and_unload()  # no record for a model that never ran
    loaded.eval()(x)
    with pytest.warns(UserWarning, match=message):
        loaded.merge_and_unload()


class Normalized(nn.Module):
    """Model with two batch normalizations, only one of which has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.plain(self.lin1(self.norm(self.lin0(x))))


def normalized(**settings):
    settings = {"r": 2, "init_sparsity": 0.3, "target_sparsity": 0.3, "target_modules": ["lin0", "lin1"]} | settings
    return get_peft_model(Normalized(), SnellaConfig(**settings))


def test_unsaved_running_statistics_warn_when_saving(tmp_path):
    model = normalized()
    optimizer = step(model)
    message = r"statistics of 1 batch-norm layer changed .* saved with the adapter: 'norm'; add them to modules_to_save"
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path)


def test_suggested_fixes_save_or_freeze_running_statistics(tmp_path):
    saved, remaining = normalized(modules_to_save=["norm"]), normalized()
    step(saved)
    remaining.base_model.model.norm.register_forward_pre_hook(lambda module, _: module.eval() and None)
    step(remaining)
    saved.save_pretrained(tmp_path / "saved")
    remaining.save_pretrained(tmp_path / "still")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Normalized(), tmp_path / "saved")
    name = "base_model.model.norm.modules_to_save.default.running_mean"
    assert torch.equal(loaded.state_dict()[name], saved.state_dict()[name])
    assert saved.state_dict()[name].abs().sum() > 0


def test_an_allocator_attached_after_the_first_step_silences_the_warning_at_saving(tmp_path):
    model = make_partly_used(target_modules=["called", "read"], target_sparsity=0.9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer)
    BudgetAllocator(model, total_epochs=2, steps_per_epoch=8).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_a_configuration_used_for_a_second_model_warns_again():
    config = SnellaConfig(r=2, target_sparsity=0.9, target_modules=["called", "read"])
    first = get_peft_model(PartlyUsed(), config)
    BudgetAllocator(first, total_epochs=2, steps_per_epoch=8).attach(
        torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=1e-3)
    )
    second = get_peft_model(PartlyUsed(), config)
    optimizer = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=1e-3)
    step(second, optimizer)
    with pytest.warns(UserWarning, match="no budget allocator is attached"):
        step(second, optimizer)


def test_saving_far_above_target_warns_once(tmp_path):
    model = make_partly_used(target_modules=["called", "read"], target_sparsity=0.9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = BudgetAllocator(model, total_epochs=2, steps_per_epoch=8).attach(optimizer)
    for _ in range(8):  # two epochs of 16 batches with gradient accumulation over 4 batches
        step(model, optimizer)
    budget = sum(allocator.budgets.values())
    message = (
        rf"saved with {budget:,} entries, but its target is 3; the allocator has counted 8 of 16 .* steps_per_epoch or "
        r"total.*allocator\.advance_to\(16\) reduces the budget"
    )
    with pytest.warns(UserWarning, match=message) as records:
        model.save_pretrained(tmp_path)
    assert len(records) == 1
    model.save_pretrained(tmp_path)
    for _ in range(8):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    other = make_partly_used(target_modules=["called", "read"], target_sparsity=0.9)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    exact = BudgetAllocator(other, total_epochs=2, steps_per_epoch=8).attach(optimizer)
    exact.has_exact_steps = True  # like a trainer's checkpoint
    step(other, optimizer)
    other.save_pretrained(tmp_path)


def test_an_allocator_of_two_models_silences_the_warnings_of_both():
    towers = nn.ModuleList(make_partly_used(target_modules=["called"], target_sparsity=0.9) for _ in range(2))
    optimizer = torch.optim.SGD([p for p in towers.parameters() if p.requires_grad], lr=1e-3)
    allocator = BudgetAllocator(towers, total_epochs=2, steps_per_epoch=2).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            sum(tower(torch.randn(3, 4)).square().sum() for tower in towers).backward()
            optimizer.step()
            optimizer.zero_grad()
    towers[0].delete_adapter("default")
    allocator.detach()

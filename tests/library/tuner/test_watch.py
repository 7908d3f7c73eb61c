"""What goes wrong silently in a training run is told, once: budgets nobody shrinks, layers nobody uses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from snella import BudgetAllocator, SnellaConfig
from snella.heads import looks_new


def train(case, model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    for _ in range(steps):
        case.run(model).square().sum().backward()
        optimizer.step()


def test_exactly_one_warning_says_what_to_call(mlp):
    model = mlp.adapted(target_sparsity=0.6)
    with pytest.warns(UserWarning) as caught:
        train(mlp, model, 30)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "target_sparsity=0.6 is set, but after 2 optimizer steps no budget allocator is attached" in message
    assert "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer)" in message
    assert "callbacks=[SnellaCallback()]" in message


def test_the_second_step_is_what_warns(mlp):
    model = mlp.adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, model, 1)
    with pytest.warns(UserWarning, match="after 2 optimizer steps no budget allocator is attached"):
        train(mlp, model, 1)


def test_an_adapter_that_is_saved_after_one_step_without_an_allocator_is_told_of(mlp, tmp_path):
    untrained, model = mlp.adapted(), mlp.adapted()
    train(mlp, model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained.save_pretrained(tmp_path / "untrained")
    with pytest.warns(UserWarning, match="after 1 optimizer step no budget allocator is attached"):
        model.save_pretrained(tmp_path / "trained")


def test_a_trained_adapter_is_trained_on_at_its_target_without_an_allocator(mlp, tmp_path):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    BudgetAllocator(model, total_epochs=1, steps_per_epoch=1).attach(optimizer)
    model.train()
    mlp.run(model).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp.base(), tmp_path, is_trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, loaded, 3)


def test_an_epoch_of_another_optimizer_does_not_end_the_watch(mlp):
    model = mlp.adapted()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for _ in range(30):
        other.step()
    with pytest.warns(UserWarning, match="no budget allocator is attached"):
        train(mlp, model, 2)


def test_an_allocator_that_is_called_by_hand_after_each_step_is_one(mlp):
    model = mlp.adapted(zero_init_ema=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    allocator = BudgetAllocator(model, total_epochs=2, steps_per_epoch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(1, 5):
            mlp.run(model.train()).square().sum().backward()
            optimizer.step()
            allocator.update_and_allocate(number)


class Classifier(nn.Module):
    """A backbone with weights that nobody would take for new, and a new head."""

    def __init__(self, head) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 64), head

    def forward(self, x):
        return self.head(self.body(x).tanh())


def drawn(weight, bias=0.0):
    """A head with a weight drawn by `weight` and one value for its biases."""
    head = nn.Linear(64, 10)
    torch.manual_seed(0)
    weight(head.weight)
    nn.init.constant_(head.bias, bias)
    return head


def two_steps(head, **settings):
    """Two steps of a training that needs no allocator."""
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
    "timm": lambda: drawn(lambda w: nn.init.trunc_normal_(w, std=0.02)),
    "transformers": lambda: drawn(lambda w: nn.init.normal_(w, std=0.02)),
    "xavier": lambda: drawn(nn.init.xavier_uniform_),
    "zeros": lambda: drawn(nn.init.zeros_),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 10, 1), nn.Flatten()),
}


@pytest.mark.parametrize("kind", NEW_HEADS)
def test_a_new_head_that_is_frozen_is_named_at_the_second_step_and_its_hooks_are_gone(kind):
    name = "head.1" if kind == "convolution" else "head"
    message = rf"the head '{name}' has its initial random values and is frozen.* modules_to_save=\['{name}'\]"
    with pytest.warns(UserWarning, match=message) as caught:
        model = two_steps(NEW_HEADS[kind]())
    assert len(caught) == 1
    assert not [m for m in model.modules() if m._forward_hooks]


def trained_head():
    head, x = nn.Linear(64, 10), torch.randn(32, 64)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    nn.functional.cross_entropy(head(x), torch.arange(32) % 10).backward()
    optimizer.step()
    return head.requires_grad_(False)


def text_embeddings():
    """A zero-shot classifier as of CLIP: a bias of zeros, and rows that point the same way."""
    head = drawn(nn.init.normal_)
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
def test_a_head_that_is_trained_or_has_learned_values_is_left_alone(make, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_steps(make(), **settings)


def test_a_new_head_that_the_model_does_not_call_is_left_alone():
    class Features(Classifier):
        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    config = SnellaConfig(r=2, init_sparsity=0.7, target_modules=["body"])
    model = get_peft_model(Features(nn.Linear(64, 10)), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()


def test_no_head_of_trained_weights_looks_new():
    torch.manual_seed(0)
    assert not looks_new(torch.randn(10, 64) + torch.randn(64), torch.zeros(10))  # correlated rows
    assert not looks_new(torch.randn(10, 640) * torch.linspace(1, 2, 10)[:, None], torch.zeros(10))
    assert not looks_new(torch.randn(10, 64) + 0.5, torch.zeros(10))
    assert not looks_new(torch.randn(10, 64), torch.full((10,), 1e-4))
    assert not looks_new(torch.randn(10, 64), None)
    assert not looks_new(torch.randn(10, 64, device="meta"), None)
    assert not looks_new(torch.ones(10, 64, dtype=torch.int8), None)
    assert not looks_new(torch.zeros(0, 64), None)
    assert not looks_new(torch.zeros(64), None)
    assert not looks_new(nn.Linear(8, 3).weight, None)  # too few to tell
    assert looks_new(nn.Linear(64, 10, bias=False).bfloat16().weight, None)


@pytest.mark.parametrize(
    "settings", [{"target_sparsity": 0.0}, {"target_sparsity": 0.5, "init_sparsity": 0.5}], ids=["dense", "constant"]
)
def test_a_run_that_needs_no_allocator_is_left_alone(mlp, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, mlp.adapted(**settings), 15)


def test_an_attached_allocator_silences_the_warning(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    BudgetAllocator(model, total_epochs=3, steps_per_epoch=5).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, model, 15)


def test_frozen_adapters_and_evaluation_are_no_training(mlp):
    model = mlp.adapted()
    model.base_model.set_requires_grad("default", False)
    other = mlp.adapted()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            mlp.run(model.train())
            mlp.run(other.eval())
            optimizer.step()


class Partly(nn.Module):
    """One layer is called, of one the weight is read, two are there only."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.spare, self.other = (nn.Linear(4, 4) for _ in range(4))
        self.attn = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = nn.functional.linear(self.called(x), self.read.weight)
        return self.attn(x, x, x)[0]


TARGETS = ["called", "read", "spare", "other", "attn"]
UNUSED = r"2 of 6 adapted modules were not used in the first optimizer step: 'spare', 'other'; the model neither called"


def partly(inject=get_peft_model, **settings):
    settings = {"r": 2, "init_sparsity": 0.3, "target_sparsity": 0.3, "target_modules": TARGETS} | settings
    return inject(Partly(), SnellaConfig(**settings))


def step(model, optimizer=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=1e-3)
    model.train()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("in_place", [False, True], ids=["peft_model", "injected"])
def test_layers_that_the_model_does_not_use_are_named_once_after_the_first_step(compiled, in_place):
    model = partly(lambda model, config: inject_adapter_in_model(config, model)) if in_place else partly()
    with pytest.warns(UserWarning, match=UNUSED) as caught:
        optimizer = step(torch.compile(model, backend="eager") if compiled else model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_an_allocator_says_nothing_more_of_them():
    model = partly(target_sparsity=0.6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    BudgetAllocator(model, total_epochs=2, steps_per_epoch=2).attach(optimizer)
    with pytest.warns(UserWarning, match=UNUSED) as caught:
        step(model, optimizer)
    assert len(caught) == 1


def test_steps_of_other_optimizers_say_nothing_of_an_adapter():
    other, model = nn.Linear(4, 4), partly()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(other)
    with pytest.warns(UserWarning, match=UNUSED):
        step(model)


def test_merging_names_what_the_model_has_not_used(tmp_path):
    model, x = partly(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=UNUSED):
        step(model)
    model.save_pretrained(tmp_path)
    message = r"merging changes 2 of 6 modules whose updates the model has not used so far: 'spare', 'other'"
    with pytest.warns(UserWarning, match=message):
        copy.deepcopy(model).merge_and_unload()
    with pytest.warns(UserWarning, match=message):
        model.merge_adapter()
    loaded = PeftModel.from_pretrained(Partly(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(loaded).unload()
    with pytest.warns(UserWarning, match=message.replace("so far", "in training")):
        copy.deepcopy(loaded).merge_and_unload()  # has run in another process alone
    loaded.save_pretrained(tmp_path / "again")
    assert SnellaConfig.from_pretrained(tmp_path / "again").unused_modules == ["spare", "other"]
    fresh = partly()
    fresh.save_pretrained(tmp_path / "fresh")
    assert SnellaConfig.from_pretrained(tmp_path / "fresh").unused_modules is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.merge_and_unload()  # nothing is known of a model that was never run
    loaded.eval()(x)
    with pytest.warns(UserWarning, match=message):
        loaded.merge_and_unload()


class Normalized(nn.Module):
    """A batch normalization between two layers, and one that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.plain(self.lin1(self.norm(self.lin0(x))))


def normalized(**settings):
    settings = {"r": 2, "init_sparsity": 0.3, "target_sparsity": 0.3, "target_modules": ["lin0", "lin1"]} | settings
    return get_peft_model(Normalized(), SnellaConfig(**settings))


def test_running_statistics_that_an_adapter_does_not_hold_are_named_when_it_is_saved(tmp_path):
    model = normalized()
    optimizer = step(model)
    message = (
        r"statistics of 1 batch normalizations changed .* saved with the adapter: 'norm'; add them to modules_to_save"
    )
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path)


def test_the_ways_out_that_are_named_save_or_keep_running_statistics(tmp_path):
    saved, still = normalized(modules_to_save=["norm"]), normalized()
    step(saved)
    still.base_model.model.norm.register_forward_pre_hook(lambda module, _: module.eval() and None)
    step(still)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.save_pretrained(tmp_path / "saved")
        still.save_pretrained(tmp_path / "still")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Normalized(), tmp_path / "saved")
    name = "base_model.model.norm.modules_to_save.default.running_mean"
    assert torch.equal(loaded.state_dict()[name], saved.state_dict()[name])
    assert saved.state_dict()[name].abs().sum() > 0


def test_an_adapter_that_is_saved_far_above_its_target_is_told_of_once(tmp_path):
    model = partly(target_modules=["called", "read"], target_sparsity=0.9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = BudgetAllocator(model, total_epochs=2, steps_per_epoch=8).attach(optimizer)
    for _ in range(8):  # what four batches a step make of two epochs of 16 batches
        step(model, optimizer)
    budget = sum(allocator.budgets.values())
    message = (
        rf"saved with {budget:,} entries, its target is 3: the allocator has counted 8 of 16 .* steps_per_epoch or "
        r"total.*allocator\.advance_to\(16\) reduces the budget"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        for _ in range(8):
            step(model, optimizer)
        model.save_pretrained(tmp_path)
    other = partly(target_modules=["called", "read"], target_sparsity=0.9)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    exact = BudgetAllocator(other, total_epochs=2, steps_per_epoch=8).attach(optimizer)
    exact.has_exact_steps = True  # as a trainer's checkpoint is saved
    step(other, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.save_pretrained(tmp_path)

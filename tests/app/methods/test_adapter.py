import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from snella_app.methods import build_method
from snella_lab.methods.adapter import Adapter, MosaAdapter


def fill(adapter):
    torch.manual_seed(2)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def test_the_forward_pass_matches_the_formula():
    adapter = fill(Adapter(6, 2, scale=0.3)).eval()
    h = torch.randn(2, 4, 6)
    down = gelu(h @ adapter.down.weight.T + adapter.down.bias)
    torch.testing.assert_close(adapter(h), h + 0.3 * (down @ adapter.up.weight.T + adapter.up.bias))


def test_the_activation_is_configurable(make_model, images):
    model = build_method("adapter-2", make_model(), activation="relu")
    adapter = fill(model.blocks[0].mlp.adapter).eval()
    h = torch.randn(2, 4, 64)
    down = (h @ adapter.down.weight.T + adapter.down.bias).clamp_min(0)
    torch.testing.assert_close(adapter(h), h + down @ adapter.up.weight.T + adapter.up.bias)
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', got 'tanh'"):
        build_method("adapter-2", make_model(), activation="tanh")


def test_the_adapter_is_applied_in_the_residual_branch_after_the_mlp(make_model, images):
    model = build_method("adapter-2", make_model()).eval()
    block = model.blocks[0]
    fill(block.mlp.adapter)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        y = x + block.attn(block.norm1(x))
        h = block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(y))))
        torch.testing.assert_close(block(x), y + block.mlp.adapter(h))


@pytest.mark.parametrize("method", ["adapter-2", "mosa-2"])
@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224"])
def test_other_architectures_have_one_adapter_per_mlp(method, name, make_model):
    small = {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2), "img_size": 56} if "swin" in name else {}
    model = build_method(method, make_model(name, **small))
    mlps = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    assert mlps and all(isinstance(m.adapter, Adapter) for m in mlps)
    size = 56 if small else 32
    model.train()(torch.randn(2, 3, size, size)).sum().backward()
    assert all(m.adapter.up.weight.grad is not None for m in mlps)


def test_a_model_without_mlps_is_reported(make_model):
    with pytest.raises(
        ValueError, match="method 'adapter' cannot be applied to ResNet: it adapts the MLP of each block"
    ):
        build_method("adapter", make_model("test_resnet"))


def test_a_second_adapter_is_rejected(make_model):
    with pytest.raises(
        ValueError,
        match="Mlp already has an attribute 'adapter' \\(Adapter\\); apply a method only once, to a fresh backbone",
    ):
        build_method("adapter", build_method("adapter", make_model()))


def test_sparse_adapters_partition_all_weights_evenly():
    sparse = MosaAdapter(8, 4, experts=4, seed=3)
    assert torch.bincount(sparse.expert_index.flatten().long()).tolist() == [8, 8, 8, 8]
    assert torch.equal(sparse.expert_index, MosaAdapter(8, 4, experts=4, seed=3).expert_index)
    assert not torch.equal(sparse.expert_index, MosaAdapter(8, 4, experts=4, seed=4).expert_index)


def test_training_uses_one_sparse_adapter_and_evaluation_their_mean():
    sparse = fill(MosaAdapter(8, 4, experts=2))
    h = torch.randn(5, 8)
    hidden = gelu(h @ sparse.down.weight.T + sparse.down.bias)
    each = [h + hidden @ (2 * sparse.up.weight * (sparse.expert_index == i)).T + sparse.up.bias for i in range(2)]
    sparse.train()
    seen = [sparse(h) for _ in range(20)]
    selected = [next(i for i in range(2) if torch.allclose(y, each[i], atol=1e-5)) for y in seen]
    assert set(selected) == {0, 1}
    torch.testing.assert_close(sparse.eval()(h), (each[0] + each[1]) / 2)


def test_only_the_weights_of_the_active_sparse_adapter_get_a_gradient():
    sparse = fill(MosaAdapter(8, 4, experts=4)).train()
    sparse(torch.randn(5, 8)).sum().backward()
    assert len(sparse.expert_index[sparse.up.weight.grad != 0].unique()) == 1
    assert sparse.down.weight.grad.count_nonzero() == 32


def test_masks_differ_between_blocks(make_model):
    model = build_method("mosa-4", make_model(), mask_seed=7)
    experts_of_blocks = [block.mlp.adapter.expert_index for block in model.blocks]
    assert not torch.equal(experts_of_blocks[0], experts_of_blocks[1])


def test_every_one_of_many_experts_has_entries():
    adapter = MosaAdapter(64, r=8, experts=300)
    assert set(adapter.expert_index.flatten().tolist()) == set(range(300))

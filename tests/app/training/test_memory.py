"""Memory of a training step: predictions from small forward passes, compared with saved and allocated memory."""

import json

import pytest
import timm
import torch
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig, create_snella_optimizer
from snella_app.methods import build_method, spec_of
from snella_app.training.build import checkpoint_gradients
from snella_app.training.memory import measured_modules, memory_table, predict_step_memory, record_forward

# these steps need no allocator
pytestmark = pytest.mark.filterwarnings("ignore:.* no budget allocator is attached:UserWarning")
METHODS = ["snella-4", "lora-4", "full"]
COMPRESSED = ("snella-4", {"compress_activations": True})
SIDE = 64


def make(method, name="test_vit", dtype=torch.float32, **options):
    torch.manual_seed(0)
    size = {"img_size": SIDE} if name == "test_vit" else {}
    return build_method(method, timm.create_model(name, num_classes=3, **size).to(dtype), **options)


def step_on(model, images):
    """Return a function that takes one step; the optimizer state is already allocated."""
    model.train()
    optimizer, labels = create_snella_optimizer(model, lr=1e-4), torch.zeros(len(images), dtype=torch.long)

    def step():
        nn.functional.cross_entropy(model(images), labels.to(images.device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def peak_bytes(function, folder):
    """Return the peak number of bytes that `function` allocates, excluding earlier allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


def stored_bytes(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def trained_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def test_recorded_bytes_equal_the_tensors_saved_by_autograd():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    # the input and the output of the activation; weights are not counted
    assert record_forward(model, torch.zeros(5, 8)).saved_bytes == 4 * (5 * 8 + 5 * 16)


def test_prediction_restores_the_model_and_random_state():
    model = timm.create_model("test_resnet", num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    predict_step_memory(model, (3, 64, 64), 8)
    assert torch.equal(torch.rand(1), expected) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failed_pass_restores_the_model():
    model = timm.create_model("test_vit", num_classes=3).eval()
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 2 channels"):
        record_forward(model, torch.zeros(2, 2, 160, 160))
    assert not model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize(("method", "options"), [*((method, {}) for method in METHODS), COMPRESSED])
def test_saved_bytes_are_extrapolated_to_another_batch_size(method, options, name):
    model = make(method, name, **options)
    memory = predict_step_memory(model, (3, SIDE, SIDE), 11)
    measured = record_forward(model, torch.randn(11, 3, SIDE, SIDE)).saved_bytes
    assert memory.saved_bytes == pytest.approx(measured, rel=0.001)
    assert memory.weights == stored_bytes(model)
    assert memory.gradients == trained_bytes(model) and memory.optimizer_state == 2 * trained_bytes(model)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snella_saves_no_more_than_lora(name, dtype):
    snella, lora = (
        predict_step_memory(make(method, name, dtype), (3, SIDE, SIDE), 16) for method in ("snella-4", "lora-4")
    )
    assert 0 < snella.saved_bytes <= lora.saved_bytes


@pytest.mark.parametrize(
    ("method", "options"), [*((method, {}) for method in METHODS), ("snella-4", {"impl": "eager"}), COMPRESSED]
)
def test_the_predicted_peak_matches_the_cpu_profiler(method, options, tmp_path):
    model, images = make(method, **options), torch.randn(12, 3, SIDE, SIDE)
    memory = predict_step_memory(model, (3, SIDE, SIDE), 12)
    peak = peak_bytes(step_on(model, images), tmp_path)
    before = stored_bytes(model) + 2 * trained_bytes(model) + images.nbytes
    assert peak > memory.saved_bytes / 2
    assert memory.total == pytest.approx(before + peak, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_predicted_peak_with_checkpointing_matches_the_cpu_profiler(method, tmp_path):
    options = {"num_classes": 3, "img_size": SIDE, "depth": 8}
    models = [build_method(method, timm.create_model("test_vit", **options)) for _ in range(2)]
    checkpoint_gradients(models[1])
    images = torch.randn(12, 3, SIDE, SIDE)
    plain, checkpointed = (predict_step_memory(model, (3, SIDE, SIDE), 12) for model in models)
    peak = peak_bytes(step_on(models[1], images), tmp_path)
    before = stored_bytes(models[1]) + 2 * trained_bytes(models[1]) + images.nbytes
    assert checkpointed.total == pytest.approx(before + peak, rel=0.1)
    assert checkpointed.saved_bytes < plain.saved_bytes / 2 and checkpointed.total < plain.total
    assert models[1].training and torch.utils.checkpoint.checkpoint.__module__ == "torch.utils.checkpoint"


def test_a_checkpointed_segment_receives_its_options_and_its_input_is_counted_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
            self.norm.eval()

        def segment(self, x, *, scale):
            return self.last(scale * self.norm(x))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.segment, self.first(x), scale=2.0, use_reentrant=False)

    model, images = Checkpointed(), torch.randn(100, 16)
    record = record_forward(model, images)
    size, statistics = images.nbytes, 2 * 100 * 4
    saved = {name: call.saved_bytes for (name, _), call in record.calls.items()}
    # images; the segment's input, saved once; inside the segment, also the normalization's statistics and its output
    assert saved == {"first": size, "norm": 2 * size + statistics, "last": 3 * size + statistics}
    assert record.saved_bytes == 2 * size and record.saves_images
    assert model.training and not model.norm.training


@pytest.mark.parametrize("method", METHODS)
def test_prediction_needs_less_memory_than_a_step_of_batch_size_1(method, tmp_path):
    torch.manual_seed(0)
    model = build_method(method, timm.create_model("test_vit", num_classes=3, img_size=128, depth=24))
    predicted = peak_bytes(lambda: predict_step_memory(model, (3, 128, 128), 1), tmp_path)
    trained = peak_bytes(step_on(model, torch.randn(1, 3, 128, 128)), tmp_path)
    assert predicted < 0.6 * trained


def test_a_backward_pass_inside_the_forward_pass_is_rejected():
    class NestedBackward(nn.Linear):
        def forward(self, x):
            return torch.autograd.grad(super().forward(x).square().sum(), self.weight)[0]

    with pytest.raises(RuntimeError, match="record_forward does not support a backward pass"):
        record_forward(NestedBackward(4, 3), torch.zeros(2, 4))


def test_an_adapted_layer_counts_as_one_module():
    model = make("lora-4")
    names = list(measured_modules(model))
    assert "base_model.model.blocks.0.attn.qkv" in names and not any("lora_A" in name for name in names)
    assert len(names) == len(set(names)) and "base_model.model.blocks.1.mlp.fc2" in names


def test_adamw_on_a_gpu_allocates_denominators_of_all_parameters():
    model = make("full")
    cpu, gpu = (predict_step_memory(model, (3, SIDE, SIDE), 1, device_type=kind) for kind in ("cpu", "cuda"))
    assert gpu.temporary == trained_bytes(model) > cpu.temporary
    assert gpu.total == stored_bytes(model) + 4 * trained_bytes(model)


@pytest.mark.parametrize(
    ("impl", "device_type", "matrices"),
    # ΔW and effective weight; partial gradients of A and B per tile; temporaries of plain torch operations
    [("numba", "cpu", 2), ("numba", "cuda", 2 + 4 / 32 + 4 / 64), ("eager", "cpu", 16), ("eager", "cuda", 16)],
)
def test_temporary_matrices_follow_the_implementation(impl, device_type, matrices):
    config = SnellaConfig(r=4, target_modules=["1"], impl=impl)
    model = get_peft_model(nn.Sequential(nn.Flatten(), nn.Linear(256, 128)), config)
    temporary = predict_step_memory(model, (1, 16, 16), 10, device_type=device_type).temporary
    assert temporary == 10 * (256 + 128) * 4 + matrices * 256 * 128 * 4


@pytest.fixture
def predict(monkeypatch):
    """Return a function that creates a table and returns the predicted memory of SNELLA, LoRA and full fine-tuning."""

    def call(*args, **options):
        rows = []

        def record(model, shape, *args, **options):
            rows.append((spec_of(model).name, shape, predict_step_memory(model, shape, *args, **options)))
            return rows[-1][-1]

        monkeypatch.setattr("snella_app.training.memory.predict_step_memory", record)
        memory_table(*args, **options)
        return rows

    return call


def test_three_methods_are_predicted_at_the_requested_size(predict):
    rows = predict("test_vit", "cpu", batch=4, img_size=32, r=2)
    assert [method for method, _, _ in rows] == ["snella-2", "lora-2", "full"]
    assert {shape for _, shape, _ in rows} == {(3, 32, 32)}
    snella, lora, full = (memory for _, _, memory in rows)
    assert snella.gradients < full.gradients / 4 and snella.saved_bytes <= lora.saved_bytes <= full.saved_bytes
    assert full.total > max(snella.total, lora.total)


def test_half_precision_halves_weights_and_saved_activations(predict):
    (_, _, full), *_ = predict("test_vit", "cpu", batch=8, img_size=32)
    (_, shape, half), *_ = predict("test_vit", "cpu", batch=8, img_size=32, dtype="bf16")
    # column statistics of an update stay in float32; with this few tokens they are a sixteenth of the total
    assert half.saved_bytes == pytest.approx(full.saved_bytes / 2, rel=0.08) and shape == (3, 32, 32)
    assert full.weights / 2 < half.weights < full.weights  # the factors stay in float32


def test_predictions_do_not_depend_on_the_random_state(predict):
    torch.manual_seed(1)
    first = predict("test_convnext", "cpu", batch=3)
    torch.manual_seed(2)
    assert first == predict("test_convnext", "cpu", batch=3)


def test_arguments_are_checked_before_a_model_is_built():
    message = r"batch must be at least 1, got 0; img_size must be at least 1, got -3; r must be at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        memory_table("no such model", batch=0, img_size=-3, r=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["snella-8", "lora-8", "full"])
def test_the_predicted_peak_matches_the_gpu_allocator(method, dtype):
    torch.cuda.empty_cache()
    others, batch = torch.cuda.memory_allocated(), 32
    model = timm.create_model("vit_base_patch16_224", num_classes=100).to("cuda", dtype)
    model = build_method(method, model)
    memory = predict_step_memory(model, (3, 224, 224), batch)
    step = step_on(model, torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype))
    torch.cuda.reset_peak_memory_stats()
    step()
    assert memory.total == pytest.approx(torch.cuda.max_memory_allocated() - others, rel=0.1)

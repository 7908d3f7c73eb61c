"""PEFT's methods against their published formulas; `W` is `[m, n]`, all values random."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from snella_app.methods import build_method

M, N = 20, 12


class Small(nn.Module):
    """One adapted layer and a head."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(N, M), nn.Linear(M, 3)

    def forward(self, x):
        return self.head(self.fc(x))


def lora(W, layer, p):
    return W + p["lora_B"] @ p["lora_A"]


def dora(W, layer, p):
    V = W + p["lora_B"] @ p["lora_A"]
    return p["lora_magnitude_vector"][:, None] * V / V.norm(dim=1, keepdim=True)


def adalora(W, layer, p):
    return W + layer.scaling["default"] / 6 * p["lora_B"] @ torch.diag(p["lora_E"][:, 0]) @ p["lora_A"]


def shira(W, layer, p):
    rows, columns = layer.shira_indices["default"].long()
    changed = W.clone()
    changed[rows, columns] += p["shira_weight"]
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 2 * (M + N)
    return changed


def supertuning(W, layer, p):
    largest = W.abs().flatten().topk(2).indices  # 1% of the entries, rounded down
    assert set(largest.tolist()) == set(layer.supertuning_indices["default"].tolist())
    changed = W.flatten().clone()
    changed[layer.supertuning_indices["default"].long()] += p["supertuning_values"]
    return changed.view(M, N)


def fourierft(W, layer, p):
    rows, columns = layer.indices["default"].long()
    i, j = torch.arange(M)[:, None, None], torch.arange(N)[None, :, None]
    angle = 2 * torch.pi * (i * rows / M + j * columns / N)
    return W + 300 / (M * N) * (p["fourierft_spectrum"] * angle.cos()).sum(-1)


def randlora(W, layer, p):
    # PEFT assigns the columns of its random B to the bases in turn
    A, B = layer.randlora_A["default"][:, 0], layer.randlora_B["default"].flatten(1)
    gamma, scales = p["randlora_gamma"], p["randlora_lambda"]
    bases = [B[:, k::3] @ torch.diag(scales[:, k]) @ A @ torch.diag(gamma[k]) for k in range(3)]
    return W + layer.scaling["default"] * sum(bases)


def vera(W, layer, p):
    A, B = layer.vera_A["default"], layer.vera_B["default"]
    return W + torch.diag(p["vera_lambda_b"]) @ B @ torch.diag(p["vera_lambda_d"]) @ A


def loha(W, layer, p):
    scaling = layer.scaling["default"]
    return W + scaling * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def lokr(W, layer, p):
    return W + layer.scaling["default"] * torch.kron(p["lokr_w1"], p["lokr_w2"])


def boft(W, layer, p):
    skew = (p["boft_R"][0] - p["boft_R"][0].transpose(1, 2)) / 2
    one = torch.eye(4)
    rotation = torch.block_diag(*((one - block) @ torch.inverse(one + block) for block in skew))
    return p["boft_s"] * (W @ rotation.T)


def hra(W, layer, p):
    for u in p["hra_u"].T:
        W = W @ (torch.eye(N) - 2 * torch.outer(u, u) / u.dot(u))
    return W


def delora(W, layer, p):
    A, B = p["delora_A"], p["delora_B"]
    scale = p["delora_lambda"] / 3 / (A.norm(dim=1) * B.norm(dim=0))
    return W + B @ torch.diag(scale) @ A * W.norm(dim=0)


METHODS = [
    ("lora-4", lora),
    ("dora-4", dora),
    ("adalora-4", adalora),
    ("shira-2", shira),
    ("supertuning", supertuning),
    ("fourierft-10", fourierft),
    ("randlora-4", randlora),
    ("vera-5", vera),
    ("loha-3", loha),
    ("lokr-3", lokr),
    ("boft-4", boft),
    ("hra-4", hra),
    ("delora-3", delora),
]


@pytest.mark.parametrize(("method", "formula"), METHODS, ids=[name for name, _ in METHODS])
def test_the_layer_equals_the_published_formula(method, formula):
    torch.manual_seed(0)
    plain = Small()
    weight, bias = plain.fc.weight.detach().clone(), plain.fc.bias.detach().clone()
    model = build_method(method, plain, head="head", target_modules=["fc"]).eval()
    layer = model.get_submodule("base_model.model.fc")
    values = {}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand_like(parameter) + 0.2)
                values[name.split(".")[0]] = parameter
        x = torch.randn(5, N)
        expected = linear(x, formula(weight, layer, values), bias)
        assert (expected - linear(x, weight, bias)).abs().max() > 0.01
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)

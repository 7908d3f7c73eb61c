"""Python calls and source files of one forward pass of an adapted `nn.Linear`, beside PEFT's LoRA.

python benchmarks/count_calls.py
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

import snella
from snella import SnellaConfig

PACKAGE = str(Path(snella.__file__).parent)
KERNELS = str(Path(PACKAGE, "ops", "backends", "numba", "forward.py"))


@dataclass
class Calls:
    """What ran during one call.

    Args:
        by_file: Python calls by source file; a Numba kernel, which reports itself as a call too, is none.
        switches: How often the file changed from one call to the next.
    """

    by_file: Counter[str] = field(default_factory=Counter)
    switches: int = 0

    def within(self, folder: str) -> Counter[str]:
        """Those in files of one folder."""
        return Counter({file: count for file, count in self.by_file.items() if file.startswith(folder)})


def count_calls(function: Callable[[], object]) -> Calls:
    """Call `function` and count, with `sys.setprofile`, the Python functions that it enters."""
    calls, last = Calls(), ""

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal last
        code: CodeType = frame.f_code
        # what has no file (a generated `__init__`) belongs to its caller
        if event != "call" or code.co_filename.startswith("<") or code.co_filename == KERNELS:
            return
        calls.by_file[code.co_filename] += 1
        calls.switches += code.co_filename != last
        last = code.co_filename

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def adapted_linear_layer(config: PeftConfig) -> tuple[nn.Module, torch.Tensor]:
    """An adapted `nn.Linear` in training after an optimizer step, and an input."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), config).train()
    layer, x = model.base_model.model[0], torch.randn(4, 64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    return layer, x


def main() -> None:
    sparse = {"r": 8, "target_modules": ["0"], "target_sparsity": 0.5, "init_sparsity": 0.5}
    configs = {f"snella, impl={impl}": SnellaConfig(**sparse, impl=impl) for impl in ("auto", "eager")}
    for name, config in {**configs, "lora": LoraConfig(r=8, target_modules=["0"])}.items():
        layer, x = adapted_linear_layer(config)
        calls = count_calls(lambda layer=layer, x=x: layer(x))
        own = calls.within(PACKAGE)
        print(
            f"{name}: {sum(own.values())} calls in {len(own)} files of snella, "
            f"{sum(calls.by_file.values())} in {len(calls.by_file)} files in all, {calls.switches} changes of file"
        )
        for file, count in own.most_common():
            print(f"  {count:4} {Path(file).relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()

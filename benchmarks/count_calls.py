"""Python calls and source files of one forward pass of an adapted `nn.Linear`, beside PEFT's LoRA, and of a training.

python benchmarks/count_calls.py
"""

from __future__ import annotations

import sys
import tempfile
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
from snella_app.config import TrainConfig
from snella_app.console import make_console
from snella_app.training.train import train

PACKAGE = str(Path(snella.__file__).parent)
KERNELS = str(Path(PACKAGE, "backends", "numba", "forward.py"))
PROJECT = str(Path(PACKAGE).parent)


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


def functions_given(kind: type, function: Callable[[], object]) -> dict[str, set[str]]:
    """Call `function`; by source file of the project, the functions that got an instance of `kind` as an argument."""
    given: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{PROJECT}/snella"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), kind) for name in names):
            given.setdefault(code.co_filename, set()).add(code.co_qualname)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return given


def small_training(out: str) -> TrainConfig:
    """Two steps of a small model on the digits."""
    sizes = {"train_size": 40, "val_size": 20, "test_size": 20}
    return TrainConfig(data="digits", backbone="test_vit", pretrained=False, img_size=32, epochs=1, out=out, **sizes)


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
            print(f"  {count:4} {Path(file).relative_to(PROJECT)}")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        config, console = small_training(str(Path(folder, "run"))), make_console(file=log)
        given = functions_given(TrainConfig, lambda: train(config, console))
    print(f"train(config): the configuration enters {sum(map(len, given.values()))} functions in {len(given)} files")
    for file, functions in sorted(given.items()):
        print(f"  {Path(file).relative_to(PROJECT)}: {', '.join(sorted(functions))}")


if __name__ == "__main__":
    main()

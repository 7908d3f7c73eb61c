"""Readability metrics: calls in a forward pass, functions of a training run, sizes of classes and packages.

Counts the Python calls in a forward pass of an adapted `nn.Linear` (SNELLA and PEFT's LoRA), the functions of a
training run that are called before its first step or receive its configuration, and the lines and dense statements of
each package and, for comparison, of PEFT.

python benchmarks/count_calls.py
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from unittest import mock

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

import snella
from snella import SnellaConfig
from snella_app.config.train import TrainConfig
from snella_app.console import make_console
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer

PACKAGE = str(Path(snella.__file__).parent)
NESTABLE = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""Conditional expressions and comprehensions."""
KERNELS = str(Path(PACKAGE, "backends", "numba", "forward.py"))
PROJECT = str(Path(PACKAGE).parent)


@dataclass
class Calls:
    """Python calls during a call of a function, by source file, and changes of the file between consecutive calls."""

    by_file: Counter[str] = field(default_factory=Counter)
    switches: int = 0

    def within(self, folder: str) -> Counter[str]:
        """Return the calls in files of a folder."""
        return Counter({file: count for file, count in self.by_file.items() if file.startswith(folder)})


def profile_calls(function: Callable[[], object], hook: Callable[[FrameType], None]) -> None:
    """Call `function` and pass the frame of each Python call to `hook`."""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            hook(frame)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)


def count_calls(function: Callable[[], object]) -> Calls:
    """Call `function` and count the Python calls that it makes."""
    calls, last, skipped = Calls(), "", getattr(function, "__code__", None)

    def count(frame: FrameType) -> None:
        nonlocal last
        code = frame.f_code
        # skip code without a file, e.g. a generated `__init__`
        if code is skipped or code.co_filename.startswith("<") or code.co_filename == KERNELS:
            return
        calls.by_file[code.co_filename] += 1
        calls.switches += code.co_filename != last
        last = code.co_filename

    profile_calls(function, count)
    return calls


def functions_receiving(kind: type, function: Callable[[], object]) -> dict[str, set[str]]:
    """Call `function` and return the project functions that receive an instance of `kind`, by source file."""
    receivers: dict[str, set[str]] = {}

    def record(frame: FrameType) -> None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        is_project = code.co_filename.startswith(f"{PROJECT}/snella")
        if is_project and any(isinstance(frame.f_locals.get(name), kind) for name in names):
            receivers.setdefault(code.co_filename, set()).add(code.co_qualname)

    profile_calls(function, record)
    return receivers


class _FirstStepError(Exception):
    """Error that stops a training run at its first step."""


def functions_before_first_step(config: TrainConfig) -> dict[str, set[str]]:
    """Start a training run and return the project's functions called before its first step, by source file.

    Names such as `train.<locals>.<listcomp>` denote comprehensions, generator expressions, lambdas and modules.
    """
    entered: dict[str, set[str]] = {}

    def record(frame: FrameType) -> None:
        code = frame.f_code
        if code.co_filename.startswith(f"{PROJECT}/snella"):
            entered.setdefault(code.co_filename, set()).add(code.co_qualname)

    def stop(*_: object) -> None:
        sys.setprofile(None)  # excludes the error handling
        raise _FirstStepError

    console = make_console(file=io.StringIO())
    with mock.patch.object(SnellaTrainer, "training_step", stop), suppress(_FirstStepError):
        profile_calls(lambda: train(config, console), record)
    return entered


@dataclass
class Size:
    """Size of a package.

    Attributes:
        modules: Number of modules.
        lines: Number of lines.
        code: Number of lines without blank lines, comments, and docstrings.
        dense: Number of dense statements, see `is_dense`.
        largest_class: Class with the most methods, and their number.
        longest_signature: Function with the most parameters, and their number.
    """

    modules: int = 0
    lines: int = 0
    code: int = 0
    dense: int = 0
    largest_class: tuple[str, int] = ("", 0)
    longest_signature: tuple[str, int] = ("", 0)


def expressions_of(statement: ast.AST) -> list[ast.AST]:
    """Return the expressions of a statement, without the statements in its body."""
    if isinstance(statement, ast.If | ast.While):
        return [statement.test]
    if isinstance(statement, ast.For):
        return [statement.iter]
    if isinstance(statement, ast.With):
        return list(statement.items)
    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr | ast.Raise):
        return [statement]
    return []


def is_dense(statement: ast.AST) -> bool:
    """Return whether a statement says too much at once.

    A dense statement meets one of these conditions:

    - It nests a comprehension or conditional expression in another one and has more than 18 syntax nodes.
    - It combines two of them in more than 24 nodes, or at least three.
    - It has more than 24 nodes per line.
    """
    nodes = nested = nestable = 0
    for expression in expressions_of(statement):
        for node in ast.walk(expression):
            if isinstance(node, ast.expr | ast.stmt | ast.comprehension | ast.withitem):
                nodes += 1
            if isinstance(node, NESTABLE):
                nestable += 1
                nested += any(isinstance(inner, NESTABLE) for inner in ast.walk(node) if inner is not node)
    if not nodes:
        return False
    is_simple = not isinstance(statement, ast.If | ast.While | ast.For | ast.With)
    lines = statement.end_lineno - statement.lineno + 1 if is_simple else 1
    return nestable >= 3 or (nested > 0 and nodes > 18) or (nestable == 2 and nodes > 24) or nodes / lines > 24


def size_of(root: Path) -> Size:
    """Count the lines, classes, signatures, and dense statements below a folder."""
    size = Size()
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        doc_lines: set[int] = set()
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                doc_lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
                size.largest_class = max(size.largest_class, (node.name, methods), key=lambda pair: pair[1])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = sum(name not in ("self", "cls") for name in names)
                size.longest_signature = max(size.longest_signature, (node.name, count), key=lambda pair: pair[1])
            size.dense += is_dense(node)
        size.modules += 1
        size.lines += len(lines)
        size.code += sum(
            bool(line.strip()) and not line.lstrip().startswith("#") and number not in doc_lines
            for number, line in enumerate(lines, start=1)
        )
    return size


def small_training(out: str) -> TrainConfig:
    """Return the configuration of a two-step run on digits with a small model."""
    sizes = {"train_size": 40, "val_size": 20, "test_size": 20}
    return TrainConfig.from_flat(
        data="digits", backbone="test_vit", pretrained=False, img_size=32, epochs=1, out=out, **sizes
    )


def adapted_linear_layer(config: PeftConfig) -> tuple[nn.Module, torch.Tensor]:
    """Return an adapted `nn.Linear` in training mode after three optimizer steps, and an input."""
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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sparse = {"r": 8, "target_modules": ["0"], "target_sparsity": 0.5, "init_sparsity": 0.5}
    configs = {f"snella, impl={impl}": SnellaConfig(**sparse, impl=impl) for impl in ("auto", "eager")}
    for name, config in {**configs, "lora": LoraConfig(r=8, target_modules=["0"])}.items():
        layer, x = adapted_linear_layer(config)
        calls = count_calls(lambda layer=layer, x=x: layer(x))
        package_calls = calls.within(PACKAGE)
        print(
            f"{name}: {sum(package_calls.values())} calls in {len(package_calls)} files of snella, "
            f"{sum(calls.by_file.values())} calls in {len(calls.by_file)} files in total, {calls.switches} file changes"
        )
        for file, count in package_calls.most_common():
            print(f"  {count:4} {Path(file).relative_to(PROJECT)}")
    with tempfile.TemporaryDirectory() as folder:
        entered = functions_before_first_step(small_training(str(Path(folder, "run"))))
    count = sum(map(len, entered.values()))
    functions: Counter[str] = Counter()
    for file, names in entered.items():
        functions[str(Path(file).relative_to(PROJECT).parent)] += sum(not name.endswith(">") for name in names)
    print(
        f"before the first step: {count} in {len(entered)} files: {functions.total()} functions and "
        f"{count - functions.total()} comprehensions, generator expressions, lambdas and modules; functions by package:"
    )
    for package, number in functions.most_common():
        print(f"  {number:4} {package}")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        config, console = small_training(str(Path(folder, "run"))), make_console(file=log)
        receivers = functions_receiving(TrainConfig, lambda: train(config, console))
    print(
        f"train(config): the configuration is passed to {sum(map(len, receivers.values()))} functions "
        f"in {len(receivers)} files"
    )
    for file, functions in sorted(receivers.items()):
        print(f"  {Path(file).relative_to(PROJECT)}: {', '.join(sorted(functions))}")
    roots = [Path(PROJECT, name) for name in ("snella", "snella_app", "snella_lab")]
    for root in (*roots, Path(peft.__file__).parent):
        size = size_of(root)
        print(
            f"{root.name}: {size.modules} modules, {size.lines:,} lines, {size.code:,} of code; "
            f"{1e3 * size.dense / size.lines:.1f} dense statements per 1,000 lines; largest class "
            f"{size.largest_class[0]} with {size.largest_class[1]} methods; longest signature "
            f"{size.longest_signature[0]} with {size.longest_signature[1]} parameters"
        )


if __name__ == "__main__":
    main()

"""Fault-injection group with random command lines and configuration files; `faults.py` describes it."""

import functools
import os
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from fault_harness import TINY, Harness, fork

from snella_app.cli import parser as _parser
from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS

ODD_VALUES = [
    "", " ", "0", "-1", "1", "2", "3.5", "1e400", "-0.0", "nan", "inf", "true", "null", "~", "[]", "{}", "[1, 2]",
    "{a: 1}", "{a: {b: c}}", "a" * 300, "\udce9", "\x1b[31m", "\n", "[/b]", "[bold]", "../x", "digits", "test_vit",
    "snella-2", "lora-0", "lora--3", "snella-99999999999", "folder:", "folder:nowhere", "masks:", "'", '"', "%s", "{",
    "]", "&x *x", "!!python/name:os.system", "999999999999999999999", "0x10", "1_0", "on", "é", "漢字", "--", "-",
    "a,b", "=", "*", "?", "(", "(a+)+$", "cpu", "cuda", "fp32",
]  # fmt: skip

CONFIGS = [
    "", "a", "[", "{}", "[]", "null", "- a\n- b", "data: digits\ndata: elpv", "data: [1]", "epochs: {a: 1}",
    "epochs: .nan",
    "method_options: 3", "method_options: {r: {}}", "method_options: {target_modules: '(a+)+$'}", "? [a]\n: b", "1: 2",
    "null: 1", "&a [*a]", "a: &a {b: *a}", "!!python/object/apply:os.system ['true']", "\x00", "\ufeffdata: digits",
    "data: digits\n\tepochs: 1", "[" * 3000, "{a: " * 2000, "- " * 3000, "data: 'x", "config: other.yaml", "lr: 1e-3",
    "lr: '1e-3'", "epochs: 1_0", "out: [a, b]", "resume: maybe", "seed: -1", "method_options: {kernel: nope}",
    "method_options: {1: 2}", "method_options: {r: .inf}", "method_options: {r: null, lora_alpha: []}",
    "backbone: {a: b}", "2001-01-01: 1", "seed: 2001-01-01", "data: !!binary aGVsbG8=", "epochs: !!set {a}",
]  # fmt: skip

REACHED = 71
"""Exit status of a fuzzed command that reached the training loop."""

MEMORY_BYTES = 8 * 2**30

EXPENSIVE = (
    *("compare", "demo", "bench", "dreambooth", "language"),
    *("generate", "evaluate-generation", "evaluate-language"),
)


def fuzzed_command(draw: random.Random, folder: Path, run: Path, images: Path) -> list[str]:
    """Mutate a valid command line."""
    name = draw.choice(list(COMMANDS)) if draw.random() < 0.6 else "train"
    argv = {
        "train": [*TINY, "--out", "run"],
        "evaluate": ["evaluate", str(run)],
        "predict": ["predict", str(run), str(images)],
        "merge": ["merge", str(run), "--out", "m.safetensors"],
        "inspect": ["inspect", str(run)],
        "data": ["data", "check", str(images)],
        "compare": [
            *("compare", "--methods", "linear,lora-2", "--data", "digits", "--backbone", "test_vit", "--out", "c")
        ],
    }.get(name, [name])
    options = [option.typed.removeprefix("--") for option in _parser.options_of(COMMANDS[name].function)]
    options += ["config", "help", "version", "print-config", "method-options.kernel", "method-options.r"]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.randrange(6)
        at = draw.randint(1, len(argv))
        option = "--" + draw.choice(options)
        if kind == 0:
            argv[at:at] = [option, draw.choice(ODD_VALUES)]
        elif kind == 1:
            argv[at:at] = [f"{option}={draw.choice(ODD_VALUES)}"]
        elif kind == 2 and len(argv) > 2:
            del argv[min(at, len(argv) - 1)]
        elif kind == 3 and len(argv) > 1:
            argv[min(at, len(argv) - 1)] = draw.choice(ODD_VALUES)
        elif kind == 4:
            argv[at:at] = [option[: draw.randint(1, len(option))]]
        else:
            text = draw.choice(CONFIGS) if draw.random() < 0.7 else fuzzed_yaml(draw)
            (folder / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
            argv[at:at] = ["--config", "config.yaml"]
    return argv


def fuzzed_yaml(draw: random.Random) -> str:
    """Mutate values and bytes of a configuration file."""
    values: dict[str, object] = {
        "data": "digits", "backbone": "test_vit", "pretrained": False, "epochs": 1, "method": "snella-2",
        "method_options": {"kernel": "rbf"}, "lr": 0.01, "img_size": 32, "out": "run",
    }  # fmt: skip
    odd_values = [None, [], {}, "", -1, 2**70, float("nan"), float("inf"), True, "a", [[1]], {"a": {}}, {1: 2}, b"x"]
    for name in draw.sample(list(values), draw.randint(1, 3)):
        values[name] = draw.choice(odd_values)
    text = bytearray(yaml.safe_dump(values).encode())
    for _ in range(draw.choice([0, 0, 1, 3])):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return text.decode("latin-1")


def run_fuzzed(argv: list[str], folder: Path) -> int:
    """Run a command line up to the training loop; only parse the settings of expensive commands."""
    call = _parser.call

    def parse_only(name: str, settings: dict[str, object]) -> Callable[[], None]:
        bound = call(name, settings)
        return (lambda: None) if name in EXPENSIVE else bound

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _parser.call = parse_only
    sys.modules["snella_app.training.train"].__dict__["_fit"] = lambda *arguments: os._exit(REACHED)
    os.chdir(folder)
    return main(argv)


def fuzzed(harness: Harness) -> None:
    """Run random command lines and configuration files."""
    for _, draw, folder in harness.trials("fuzzed"):
        argv = fuzzed_command(draw, folder, harness.finished, harness.images)
        result = fork(functools.partial(run_fuzzed, argv, folder), limit_s=60)
        if result.has_traceback:
            harness.count("fuzzed", "traceback", " ".join(map(repr, argv)), result.text)
        else:
            harness.count("fuzzed", "accepted" if result.status in (0, REACHED) else "one line")

"""A device of torch that computes on the CPU, but rejects CPU tensors and float64 like an accelerator.

`build(folder)` compiles the device; `register(library)` adds it to torch as `emulated`, once per process.
"""

import hashlib
import subprocess
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

NAME = "emulated"


def build(folder: Path) -> Path:
    """Return the shared library; compile it with g++ unless `folder` has one of the same source and torch version."""
    source = Path(__file__).with_name("emulated_device.cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library, unfinished = folder / f"{digest}.so", folder / f"{digest}.tmp"
    if not library.exists():
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", *(f"-I{path}" for path in include_paths())]
        command += [str(source), "-o", str(unfinished), f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        unfinished.rename(library)
    return library


def register(library: str | Path) -> None:
    """Add the device to torch under `NAME`."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    vars(module).update(functions)
    torch._register_device_module(NAME, module)
    torch.accelerator.empty_cache = lambda: None  # torch's function needs a caching allocator; accelerate calls it
    torch.utils.generate_methods_for_privateuse1_backend()

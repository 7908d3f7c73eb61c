"""One thread a test process: `make test` runs two of them side by side, and more threads than cores only wait.

`TEST_THREADS` sets another number (`make test-isa`).
"""

import os
import shutil

import pytest
import torch
from hypothesis import settings

from .browser import Browser

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
if not torch.cuda.is_available():
    # read when Triton is imported, which other packages do: its kernels are then run by an interpreter on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples in every run, so that a red test is a change of ours; `make test-slow` looks for new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("new", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One headless Chromium for all tests of a worker."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed; on Debian: apt install chromium")
    chromium = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()

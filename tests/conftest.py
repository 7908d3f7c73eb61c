"""One thread a test process: `make test` runs two of them side by side, and more threads than cores only wait."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read when Triton is imported, which other packages do: its kernels are then run by an interpreter on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""One thread a test process: `make test` runs two of them side by side, and more threads than cores only wait."""

import torch

torch.set_num_threads(1)

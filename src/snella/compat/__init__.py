"""Support for other features of PyTorch and PEFT: attention, quantization, hooks, compilation and files."""

"""Compatibility with other parts of PyTorch and PEFT: attention, quantization, hooks, compilation and files."""

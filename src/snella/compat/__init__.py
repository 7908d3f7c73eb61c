"""Support for features of PyTorch and PEFT: attention, tokens, quantization, hooks, compilation, hot swap and files."""

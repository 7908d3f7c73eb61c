"""Work with other parts of PyTorch and PEFT: attention modules, quantized weights, hooks, compilation, files."""

"""Data: image folders, masks, tables, Hugging Face datasets and benchmarks, split for training."""

"""Data: image folders, tables and bundled datasets, split for training."""

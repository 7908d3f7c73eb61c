"""Smaller activations for the backward pass: recomputed, compressed to eight bits, or sampled."""

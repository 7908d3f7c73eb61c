"""Baseline methods that PEFT does not provide."""

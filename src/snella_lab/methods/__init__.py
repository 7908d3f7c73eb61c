"""Baseline methods that are missing in PEFT."""

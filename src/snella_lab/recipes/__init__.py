"""Recipes: complete trainings built from the parts of a run: DreamBooth, instruction tuning, the demonstration."""

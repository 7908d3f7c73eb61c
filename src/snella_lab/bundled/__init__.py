"""Images and weights that ship inside Python packages."""

"""Figures, tables and the HTML report of a run. Imports no submodule: prediction must not load Matplotlib."""

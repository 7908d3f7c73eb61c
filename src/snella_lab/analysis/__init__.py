"""The paper's analyses of trained runs, as figures and tables.

The plot functions in `plot.KINDS` take folders and return `Plot`s, which `plot.write_plots` writes.
"""

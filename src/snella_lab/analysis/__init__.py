"""The paper's analyses of your runs, as figures and tables.

Every plot function in `plot.KINDS` takes run folders and returns `Plot`s for `plot.write_plots`.
"""

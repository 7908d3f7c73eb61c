"""The paper's analyses of trained runs, as figures and tables; see `plot.make_plots`."""

"""Figures, tables and the HTML report of a run; imports no module, so that predictions do not import matplotlib."""

"""Figures, tables and the report page of a run, from the files of its folder."""

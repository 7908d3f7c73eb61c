"""Datasets and backbone weights that ship in Python and Debian packages."""

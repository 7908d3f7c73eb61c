"""Analyses of the SNELLA paper for trained runs (see `plot`) and kernels (see `matrix_fit`), as figures and tables."""

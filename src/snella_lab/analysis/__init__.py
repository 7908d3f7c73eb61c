"""The paper's analyses of trained runs and kernels, as figures and tables; see `plot` and `matrix_fit`."""

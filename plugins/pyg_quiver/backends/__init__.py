"""Sampling backends: the same draws in numba (CPU), torch operations (anywhere) and Triton (GPU)."""

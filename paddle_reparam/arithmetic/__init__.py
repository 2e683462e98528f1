"""Arithmetic on kernels, in float64, and what goes into it and comes out: geometry, tensors, initial values."""

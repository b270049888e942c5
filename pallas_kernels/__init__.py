"""Mosaic GPU kernels for Hopper: plain arrays in, plain arrays out.

Kernels know nothing of fp4jax, which calls them and says what they compute; each file holds one
subject, its tuning table, the kernel and its public wrapper.
"""

"""Mosaic GPU kernels for Hopper: plain arrays in, plain arrays out.

Kernels know nothing of fp4jax, which calls them; each file holds one subject, its tuning table, the
kernel, its public wrapper, and the jnp reference that defines it.
"""

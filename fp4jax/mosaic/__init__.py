"""How fp4jax reaches the Hopper kernels of `pallas_kernels`: what they serve, and with which."""

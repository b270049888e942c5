"""SwiGLU, the activation between the two GEMMs of `moe_ffn`, and its backward pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.checkpoint  # keeps its bf16 input for the backward pass, not five float32 intermediates
def swiglu(gate_and_up: Float[Array, "*t f2"]) -> Float[Array, "*t f"]:
  """silu(gate) * up in float32; gate and up are the two halves of the last axis."""
  gate, up = jnp.split(gate_and_up.astype(jnp.float32), 2, axis=-1)
  return (jax.nn.silu(gate) * up).astype(gate_and_up.dtype)


def swiglu_backward(
  h: Float[Array, "m f2"], g: Float[Array, "m f"], after: Float32[Array, "m 1"]
) -> tuple[Float[Array, "m f"], Float[Array, "m f2"], Float32[Array, " m"]]:
  """For a = swiglu(h): a * after, the gradient of h given that of a, g * after, and <a, g>."""
  a, pull = jax.vjp(swiglu, h)
  a, g = a.astype(jnp.float32), g.astype(jnp.float32)
  return (a * after).astype(h.dtype), pull((g * after).astype(h.dtype))[0], jnp.sum(a * g, axis=-1)

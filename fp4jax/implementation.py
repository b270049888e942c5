"""Which implementation computes a call: XLA, or the Hopper kernels of `pallas_kernels`.

Functions that take `implementation=` take one of

    "xla"     everything, anywhere
    "mosaic"  the kernels, or an error that says what they can't do
    None      "mosaic" where it can run, and gives the numbers that "xla" would give: to the last
              bit in `quantize` and `dequantize`, up to the order of float32 sums in the GEMMs

In three places "mosaic" differs by more. Its SwiGLU has an exp that is off by 2^-20 of its value at
8 from zero, and by more beyond; few values are then rounded the other way. With HOPPER_FP4, wgrad's
lhs takes the scale of 128 tokens from the largest MXFP4 scale among them, not from their largest
value: the same products while the scales of 128 tokens lie within 14 binades, beyond which the
smallest values are rounded. The linear layers of a model by kernels have gradients of their
weights in the weights' own dtype, where XLA, and `dot_general` alone, round them to that of x.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

Implementation = Literal["xla", "mosaic"]


def choose(
  named: Implementation | None, obstacle: str | None, argument: str = "implementation"
) -> Implementation:
  """The one to run: what `argument` names, `obstacle` being why the kernels can't.

  Raises:
    ValueError: "mosaic" with an obstacle, or a name that is none.
  """
  match named:
    case None:
      return "xla" if obstacle else "mosaic"
    case "mosaic" if obstacle:
      raise ValueError(f'{argument}="mosaic": {obstacle}')
    case "mosaic" | "xla":
      return named
    case _:
      raise ValueError(f"{argument}={named!r} is not one of {get_args(Implementation)} or None")


def device_obstacle() -> str | None:
  """Why the default device can't run the kernels."""
  capability = compute_capability()
  if capability == "9.0":
    return None
  return f"the kernels need compute capability 9.0 (Hopper); this device has {capability}"


def dtype_obstacle(**arrays: Array | jax.ShapeDtypeStruct) -> str | None:
  """Which of the arrays is not bfloat16."""
  for name, x in arrays.items():
    if x.dtype != jnp.bfloat16:
      return f"the kernels take bfloat16; {name} is {x.dtype}"
  return None


def compute_capability() -> str:
  """Of the default device: "9.0" on Hopper, "none (cpu)" without a GPU."""
  device = default_device()
  return getattr(device, "compute_capability", None) or f"none ({device.platform})"


def default_device() -> Any:
  """The jax.Device on which a program runs that names none."""
  device = jax.config.jax_default_device or jax.devices()[0]
  return jax.devices(device)[0] if isinstance(device, str) else device

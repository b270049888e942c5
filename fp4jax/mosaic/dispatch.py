"""`AllToAll` among the GPUs of one host, by kernels that reach into the memory of the peers."""

import dataclasses

import jax
from jax import lax
from jaxtyping import Array

from fp4jax.dispatch import AllToAll, packed
from fp4jax.implementation import Implementation, device_obstacle
from fp4jax.mosaic.quantize import MXFP4
from fp4jax.quantized_array import QuantizedArray
from fp4jax.sharding import vary, varying_axes

# Of a row's width: its codes and its scales then have multiples of 16 bytes in every format.
MULTIPLE = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PeerMemory(AllToAll):
  """Rows are stored into the peers' memory and read from it; what is small, and what GEMMs hide,
  goes as in `AllToAll`.

  A slot that no row is for holds anything, where `AllToAll` has zeros.
  """

  def send_rows(self, x, fmt, implementation):
    from pallas_kernels import exchange

    to = self.slot_of_token, self.token_of_slot.shape[1], self.axis
    if fmt in MXFP4 and exchange.quantizes(x):
      parts = exchange.send_mxfp4(x, *to, scale_rule=fmt.scale_rule)
      arrived = QuantizedArray(*parts, None, fmt, -1)
    else:
      parts, structure = jax.tree.flatten(packed(x, fmt, implementation))
      arrived = jax.tree.unflatten(structure, exchange.send(parts, *to))
    # XLA would send twice: once more, straight to where a scan keeps what arrived.
    arrived = lax.optimization_barrier(arrived)
    return vary(arrived, varying_axes(x, self.slot_of_token))

  def collect(self, rows, sent, dtype, hidden=False):
    if hidden:  # XLA sends beside other kernels, and no kernel runs beside another
      return super().collect(rows, sent, dtype)
    from pallas_kernels import exchange

    sums = exchange.collect(rows.astype(sent), self.slot_of_token, self.axis, dtype)
    return vary(sums, varying_axes(rows, self.slot_of_token))


def obstacle(
  implementation: Implementation, expert_axis: str | None, x: Array | jax.ShapeDtypeStruct
) -> str | None:
  """Why rows of x can't travel so; None if they can. `implementation` is that of the GEMMs."""
  if expert_axis is None:
    return "without expert_axis no row travels"
  if implementation != "mosaic":
    return 'empty slots hold anything, which implementation="mosaic" alone leaves out'
  if why := device_obstacle():
    return why
  if jax.process_count() > 1:
    return f"the kernels reach the GPUs of one process; there are {jax.process_count()} processes"
  mesh = jax.sharding.get_abstract_mesh()
  others = [a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1]
  if others:
    return f"jax.shard_map around the call leaves out the mesh axes {others}"
  if x.shape[1] % MULTIPLE:
    return f"rows of width {x.shape[1]}, no multiple of {MULTIPLE}"
  return None

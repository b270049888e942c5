"""Rows between all GPUs of the process by the kernels: for the sweep and for the sanitizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import exchange, mxfp4

_ALL = "all"


def calls(tokens: int, d: int, slots: int, share: float = 1.0) -> dict[str, tuple]:
  """By their entry of TUNING, kernels over all devices and their arguments, for rows of width d.

  Each of a device's tokens goes to each device with probability `share`, while there are slots.
  """
  devices = jax.device_count()
  if devices < 2:
    raise ValueError("rows between devices need two or more; there is one")
  mesh = jax.make_mesh((devices,), (_ALL,), axis_types=(AxisType.Auto,))
  place = NamedSharding(mesh, P(_ALL))
  goes = np.random.default_rng(0).random((devices**2, tokens)) < share
  slot = np.where(goes, np.minimum(np.cumsum(goes, axis=1) - 1, slots), slots).astype(np.int32)
  slot = jax.device_put(slot, place)
  normal = jax.jit(
    lambda seed, rows: jax.random.normal(jax.random.key(seed), (rows, d), jnp.bfloat16),
    static_argnums=1,
    out_shardings=place,
  )
  x, inbox = normal(0, devices * tokens), normal(1, devices**2 * slots)

  def over(kernel: Callable) -> Callable:
    return jax.shard_map(kernel, mesh=mesh, in_specs=P(_ALL), out_specs=P(_ALL), check_vma=False)

  return {
    "send": (over(lambda x, s: exchange.send([x], s, slots, _ALL)), (x, slot)),
    "mxfp4": (over(lambda x, s: exchange.send_mxfp4(x, s, slots, _ALL)), (x, slot)),
    "collect": (over(lambda x, s: exchange.collect(x, s, _ALL)), (inbox, slot)),
  }


def check(name: str, out, arguments: tuple) -> None:
  """Raises ValueError for a result of a call with a slot for every token that is wrong."""
  rows, slot = arguments
  devices, tokens = jax.device_count(), slot.shape[1]
  if name == "collect":
    parts = np.asarray(rows, np.float32).reshape(devices, devices, tokens, -1)
    expected = [jnp.asarray(sum(parts), jnp.bfloat16).reshape(len(rows) // devices, -1)]
  else:
    whole = jnp.asarray(np.asarray(rows))
    expected = [whole] if name == "send" else mxfp4.quantize_mxfp4(whole)
    expected = [np.tile(np.asarray(e), (devices, 1)) for e in expected]
  for a, e in zip(jax.tree.leaves(out), expected, strict=True):
    if not np.array_equal(np.asarray(a), np.asarray(e)):
      raise ValueError(f"exchange.{name}: rows are not those that were sent")

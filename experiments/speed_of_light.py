"""What a training step would take if its GEMMs alone ran, at the measured peak of the device.

The GEMMs are counted as the model asks for them, without padding, recomputation or quantization.
The peak is that of one large product of plain arrays in the dtype that a GEMM is multiplied in.
"""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.typing import DTypeLike

import fp4jax
from experiments.config import ALL_GEMMS, Experiment
from fp4jax import dot
from fp4jax.implementation import Implementation
from fp4jax.models import LanguageModel, Policy
from fp4jax.mosaic import gemms as mosaic
from fp4jax.products import gemm
from fp4jax.recipe import Recipe

_HEAD = "head.logits"
# Of the axis that each GEMM contracts, where a recipe is traced: a multiple of any block, and the
# length of no transform, which is a power of two.
_CONTRACTED = {"wgrad": 3 * 1024, "fprop": 5 * 1024, "dgrad": 7 * 1024}
_Operands = tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]


def at_peak(config: Experiment, vocab_size: int, policies: dict[str, Policy]) -> dict[str, Any]:
  """For environment.json: the peaks by dtype, and by run the seconds per step of its GEMMs at them.

  A number that can't be known is None.
  """
  work = {name: flops_by_dtype(config, vocab_size, policy) for name, policy in policies.items()}
  peaks = {dtype: measured_peak(dtype) for dtype in sorted(set().union(*work.values()))}
  seconds = {name: seconds_at_peak(own, peaks) for name, own in work.items()}
  return {"peak_flops_per_s": peaks, "gemm_seconds_at_peak": seconds}


def seconds_at_peak(work: dict[str, float], peaks: dict[str, float | None]) -> float | None:
  """What `flops_by_dtype` says of a step takes at the peaks; None where one is not known."""
  if None in map(peaks.get, work):
    return None
  return sum(flops / peaks[dtype] for dtype, flops in work.items())


def gemm_flops(config: Experiment, vocab_size: int) -> dict[str, dict[str, int]]:
  """Floating-point operations per training step, by name of the GEMM, and fprop, dgrad and wgrad.

  2 m k n each, of all layers: "experts.w13" of 10 tokens, top_k=2, has m=20. Of the scores of
  attention those count that the model asks for, t (t + 1) / 2 of t x t: what is masked does not,
  whether or not an implementation computes it.
  """
  length, found = config.data.sequence_length, {}
  for name, (x, w) in _operands(config, vocab_size).items():
    flops = 2 * x.size * w.shape[-1] * config.data.microbatches * len(_layers(config, name))
    if name.startswith("scores."):
      flops = flops * (length + 1) // (2 * length)
    found[name] = dict.fromkeys(ALL_GEMMS, flops)
  return found


def flops_by_dtype(config: Experiment, vocab_size: int, policy: Policy) -> dict[str, int]:
  """The work of a training step under `policy`, by the dtype in which it is multiplied."""
  found: dict[str, int] = {}
  flops = gemm_flops(config, vocab_size)
  for name, operands in _operands(config, vocab_size).items():
    layers = _layers(config, name)
    for layer in layers:
      recipe = policy.recipe(name, layer, config.model.num_layers)
      implementation = _implementation(config, policy, recipe, name, operands)
      by_gemm = multiplied_dtypes(recipe, implementation, operands[0].dtype)
      for role, dtypes in by_gemm.items():
        for dtype in dtypes:
          found[dtype] = found.get(dtype, 0) + flops[name][role] // len(layers)
  return found


@functools.cache
def multiplied_dtypes(
  recipe: Recipe, implementation: Implementation, dtype: jnp.dtype
) -> dict[str, tuple[str, ...]]:
  """In which dtypes fprop, dgrad and wgrad of arrays of `dtype` are multiplied: of each product,
  for an operand of several terms makes several."""
  if implementation == "mosaic":
    return {role: (mosaic.multiplied_dtype(recipe, role).name,) for role in ALL_GEMMS}
  m, k, n = (_CONTRACTED[role] for role in ("wgrad", "fprop", "dgrad"))
  x, w, dy = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (k, n), (m, n)))

  def three_gemms(x, w, dy):
    state = fp4jax.init_state(recipe, x.shape, w.shape)
    key = jax.random.key(0)
    product = fp4jax.dot_general(recipe, key=key, state=state, implementation="xla")
    y, pull = jax.vjp(lambda x, w: product(x, w, (((1,), (0,)), ((), ()))), x, w)
    return y, pull(dy)

  products = list(_products(jax.make_jaxpr(three_gemms)(x, w, dy).jaxpr))
  return {
    role: tuple(multiplied for contracted, multiplied in products if contracted == length)
    for role, length in _CONTRACTED.items()
  }


def measured_peak(dtype: DTypeLike) -> float | None:
  """Floating-point operations per second of a large product on the default device, summed in
  float32: the best of ten times. None where there is no such product: a CPU has none of FP8."""
  dtype, on_cpu = jnp.dtype(dtype), jax.default_backend() == "cpu"
  if on_cpu and dtype.itemsize == 1:
    return None
  size, calls = (1024, 2) if on_cpu else (8192, 4)  # calls: enough to hide what a launch costs
  # Not of one value: a GPU multiplies zeros and ones faster. Both are contracted along their last
  # axis, which FP8 needs.
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  product = jax.jit(lambda a, b: gemm(a, b, (((1,), (1,)), ((), ()))))
  try:
    product(x, x).block_until_ready()
  except jax.errors.JaxRuntimeError:  # the device has no such product
    return None
  times = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready([product(x, x) for _ in range(calls)])
    times.append(time.perf_counter() - start)
  return calls * 2 * size**3 / min(times)


def _operands(config: Experiment, vocab_size: int) -> dict[str, _Operands]:
  """x (*b, m, k) and w (*b, k, n) of each GEMM of one layer and one microbatch; of experts
  x (m, k) and w (e, k, n)."""
  c, length = config.model, config.data.sequence_length
  batch = config.data.batch_size // config.data.microbatches
  model = nnx.eval_shape(lambda: LanguageModel(c, vocab_size, nnx.Rngs(0)))
  found = {}
  for name, (*experts, k, n) in (model.block_gemms | {_HEAD: model.head_shape}).items():
    if name.startswith("scores."):
      k, n = (length if size == 1 else size for size in (k, n))
      shapes = (batch * c.num_heads, length, k), (batch * c.num_heads, k, n)
    else:
      shapes = (batch * length * (c.top_k if experts else 1), k), (*experts, k, n)
    dtype = jnp.float32 if name.startswith("router.") else jnp.dtype(c.dtype)
    found[name] = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
  return found


def _layers(config: Experiment, name: str) -> range:
  n = config.model.num_layers
  return range(n, n + 1) if name == _HEAD else range(n)


def _implementation(
  config: Experiment, policy: Policy, recipe: Recipe, name: str, operands: _Operands
) -> Implementation:
  """The one that runs. Under "mosaic" what the kernels can't do is a plain product, XLA's own, or
  raises when the step is traced."""
  x, w = operands
  if w.ndim == 3 and name.startswith("experts."):
    sequences = config.data.batch_size // config.data.microbatches
    tokens = sequences * config.data.sequence_length
    widths = {"d": config.model.d_model, "f": config.model.d_ff}
    obstacle = mosaic.obstacle(recipe, (), tokens, widths, x=x)
  else:
    obstacle = dot.obstacle(recipe, (), x, w, x.dtype)
  return "xla" if obstacle or policy.implementation == "xla" else "mosaic"


def _products(jaxpr: Jaxpr) -> Iterator[tuple[int, str]]:
  """Length of the contracted axis and dtype of each dot_general in it, at any depth."""
  for eqn in jaxpr.eqns:
    if eqn.primitive is lax.dot_general_p:
      x, ((axes, _), _) = eqn.invars[0].aval, eqn.params["dimension_numbers"]
      yield math.prod(x.shape[axis] for axis in axes), x.dtype.name
    for inner in jaxprs_in_params(eqn.params):
      yield from _products(inner)

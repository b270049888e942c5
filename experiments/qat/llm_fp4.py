"""LLM-FP4 (arXiv 2310.16836) of a language model: each GEMM's formats and exponent biases.

The search keeps the product of each GEMM, on what it reads in bf16 of calibration text. A round has
two halves. The first finds the weights' format, one for all, and a bias for each column, with the
activations as last found. The second finds the activations' format and one bias, beside pre-shifted
ones for their columns, with those weights.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from experiments.qat import blocks
from experiments.qat.evaluate import Student
from experiments.qat.policies import TEACHER, llm_fp4, policy_of
from fp4jax.formats.llm_fp4 import LLM_FP4
from fp4jax.models import LanguageModel
from fp4jax.quantizers.llm_fp4 import Found, first_scales, rounded, search, shifts

DELTAS = tuple(round(0.05 * i, 2) for i in range(-10, 31))  # of exponent biases: 0.7 to 2.8 x less
MINMAX = (0.0,)  # the largest magnitude on the largest element


class GemmFound(NamedTuple):
  weights: Found  # scales (n,)
  activations: Found  # scales (k,); as they are where they are not quantized
  error: Float32[Array, ""]  # of the product, of the sum of its squares


@functools.partial(jax.jit, static_argnames=("deltas", "rounds", "activations", "formats"))
def search_gemm(
  x: Float[Array, "t k"],
  w: Float[Array, "k n"],
  *,
  deltas: tuple[float, ...] = DELTAS,
  rounds: int = 3,
  activations: bool = True,
  formats: tuple[int, ...] = (0, 1, 2),
) -> GemmFound:
  """The least squared error of x @ w."""
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  y, tried = dot(x, w), jnp.float32(deltas)
  of_columns = shifts(jnp.max(jnp.abs(x), axis=0))
  first_x, first_w = first_scales(jnp.max(jnp.abs(x))), first_scales(jnp.max(jnp.abs(w), axis=0))

  def read_x(fmt, scale):
    each = scale * jnp.exp2(-of_columns[fmt].astype(jnp.float32))
    return rounded(x, each, fmt) * each

  def error_of_w(read, fmt, scale):
    return jnp.sum((dot(read, rounded(w, scale, fmt) * scale) - y) ** 2, axis=0)

  def error_of_x(values, fmt, scale):
    return jnp.sum((dot(read_x(fmt, scale), values) - y) ** 2)

  of_x = Found(jnp.int32(formats[len(formats) // 2]), first_x[formats[len(formats) // 2]], None)
  for _ in range(rounds if activations else 1):
    read = read_x(of_x.format, of_x.scale) if activations else x
    of_w = search(first_w, tried, functools.partial(error_of_w, read), formats)
    if activations:
      values = rounded(w, of_w.scale, of_w.format) * of_w.scale
      of_x = search(first_x, tried, functools.partial(error_of_x, values), formats)
  error = of_x.error if activations else of_w.error
  scales = of_x.scale * jnp.exp2(-of_columns[of_x.format].astype(jnp.float32))
  return GemmFound(of_w, of_x._replace(scale=scales), error / jnp.sum(y**2))


def quantize_model(
  model: LanguageModel, tokens: np.ndarray, activations: bool, **options: Any
) -> tuple[Student, list[dict[str, Any]]]:
  """The student, and of each GEMM of each layer the formats and the error of its product.

  Args:
    tokens: calibration windows (n, t).
    activations: whether they are quantized too.
    options: of `search_gemm`.
  """
  graph, params = blocks.split_blocks(model)
  x = model.embedding(jnp.asarray(tokens)).astype(model.dtype)
  elements = {name: [] for name in model.blocks.matrices}
  states, told = [], []
  for layer, of_layer in enumerate(params):
    x, reads = blocks.record_block(graph, TEACHER, of_layer, x)
    states.append({})
    for name, stacked in model.blocks.matrices.items():
      w, read = stacked[...][layer].astype(model.dtype), reads[name]
      found = search_gemm(read.reshape(-1, read.shape[-1]), w, activations=activations, **options)
      elements[name].append(rounded(w, found.weights.scale, found.weights.format))
      own = {"fprop.rhs": {"scale": found.weights.scale[None]}}
      if activations:
        fmt = found.activations.format.astype(jnp.float32)
        own["fprop.lhs"] = {"scale": found.activations.scale, "format": fmt}
      states[-1][name] = own
      told.append(_told(layer, name, found, activations))
  quantized = blocks.with_blocks(model, params)
  for name, w in quantized.blocks.matrices.items():
    w.set_value(jnp.stack(elements[name]))
  return Student(quantized, policy_of(llm_fp4(activations)), blocks.stacked_states(states)), told


def _told(layer, name, found, activations):
  format_of = lambda part: LLM_FP4[int(part.format)].name  # noqa: E731
  return {
    "layer": layer,
    "gemm": name,
    "weights": format_of(found.weights),
    "activations": format_of(found.activations) if activations else None,
    "relative_error": float(found.error),
  }

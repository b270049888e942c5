"""Runs every kernel on small ragged inputs, for NVIDIA's compute-sanitizer to watch.

    make gpu-sanitize
    make gpu-sanitize SANITIZER_TOOLS=memcheck KERNELS="swiglu exchange"

With several GPUs, those that reach into each other's memory too. Kernels are named by any part of
what is printed for them. Checks no results: the tests do.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp

from experiments import kernel_cases as cases
from experiments import kernel_exchange
from pallas_kernels import few_rows, grouped_matmul

_SHAPES = ((100, 512), (128, 512))  # rows that no tile divides, unless a kernel refuses them
_SIZES = (130, 0, 1, 127)  # ends inside a wave, no rows, one row; 43 of 301 rows are nobody's


def launches() -> Iterator[tuple[str, Callable, tuple]]:
  """Name, kernel and arguments of every launch."""
  for case in cases.BY_NAME.values():
    shape = _SHAPES[0] if _accepts(case, _SHAPES[0]) else _SHAPES[1]
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    yield f"{case.name} {shape}", case.kernel, (case.prepare(x),)
  for name, config in grouped_matmul.VARIANTS.items():
    for kernel, operands in (
      (grouped_matmul.grouped_matmul, _matmul_operands()),
      (grouped_matmul.grouped_wgrad, _wgrad_operands()),
    ):
      sizes = jnp.array(_SIZES, jnp.int32)
      yield (
        f"{kernel.__name__}, {name}",
        lambda *a, kernel=kernel, config=config: kernel(*a, config=config),
        (*operands, sizes),
      )

  for name, config in {"as tuned": None, **few_rows.VARIANTS}.items():
    kernel = functools.partial(few_rows.few_rows_matmul, config=config)
    yield f"few_rows_matmul, {name}", kernel, _packed_operands(100 if config is None else 1)
  for name, config in {"as tuned": None, **few_rows.FP8_VARIANTS}.items():
    kernel = functools.partial(few_rows.few_rows_matmul, config=config)
    yield f"few_rows_matmul of FP8, {name}", kernel, _fp8_operands(60 if config is None else 1)
  for name, operands in {"MXFP4": _packed_operands(9), "FP8": _fp8_operands(9)}.items():
    three = tuple(jnp.stack([part] * 3) for part in operands)
    yield f"few_rows_matmul of three matrices in {name}", few_rows.few_rows_matmul, three


def _accepts(case: cases.Case, shape: tuple[int, int]) -> bool:
  try:
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    jax.eval_shape(lambda x: case.kernel(case.prepare(x)), x)
  except ValueError:
    return False
  return True


def _packed_operands(m, k=512, n=256):
  """A few rows, and MXFP4 codes and scales of a matrix."""
  x = jax.random.normal(jax.random.key(2), (m, k), jnp.bfloat16)
  codes = jax.random.bits(jax.random.key(3), (k // 2, n), jnp.uint8)
  return x, codes, jnp.full((k // 32, n), 127, jnp.uint8)


def _fp8_operands(m, k=512, n=256):
  """A few rows, and E4M3 codes and scales of a matrix."""
  x = jax.random.normal(jax.random.key(2), (m, k), jnp.bfloat16)
  codes = jax.random.randint(jax.random.key(3), (k, n), 0, 0x7F, jnp.uint8)
  return x, codes, jnp.ones((k // 128, n // 128), jnp.float32)


def _operand(rows, blocks_of, columns):
  """E4M3 elements (rows, columns) and their scales (columns / 128, blocks_of)."""
  elements = jax.random.normal(jax.random.key(1), (*rows, columns)).astype(jnp.float8_e4m3fn)
  return elements, jnp.ones(blocks_of, jnp.float32)


def _matmul_operands(m=301, k=384, n=256):
  e = len(_SIZES)
  return *_operand((m,), (k // 128, m), k), *_operand((e, n), (e, n // 128, k // 128), k)


def _wgrad_operands(k=256, n=256):
  t = 128 * sum(-(-s // 128) for s in _SIZES)
  return *_operand((k,), (t // 128, k), t), *_operand((n,), (t // 128, n), t)


def calls_between_devices() -> Iterator[tuple[str, Callable, tuple]]:
  """The same of the kernels that reach into other GPUs' memory."""
  tokens, d = _SHAPES[1]
  for name, (program, arguments) in kernel_exchange.calls(tokens, 2 * d, 60, 0.7).items():
    yield f"exchange.{name}, {jax.device_count()} devices", program, arguments


def chosen(
  found: Iterable[tuple[str, Callable, tuple]], parts: Sequence[str]
) -> list[tuple[str, Callable, tuple]]:
  """Those with any of the parts in their names; all without parts.

  Raises:
    ValueError: a part of no name.
  """
  found = list(found)
  for part in parts:
    if not any(part in name for name, *_ in found):
      raise ValueError(f"{part!r} is part of no kernel's name: {'; '.join(n for n, *_ in found)}")
  return [one for one in found if not parts or any(part in one[0] for part in parts)]


def main(parts: Sequence[str]) -> None:
  if jax.devices()[0].platform != "gpu":
    raise SystemExit("compute-sanitizer needs an NVIDIA GPU")
  with jax.default_device(jax.devices("cpu")[0]):  # what XLA prepares needs no watching
    found = list(launches())
  alone = {name for name, *_ in found}
  if jax.device_count() > 1:
    found += calls_between_devices()
  for name, kernel, arguments in chosen(found, parts):
    if name in alone:
      arguments = jax.device_put(arguments, jax.devices()[0])
    print(name, flush=True)
    jax.block_until_ready(jax.jit(kernel)(*arguments))


if __name__ == "__main__":
  main(sys.argv[1:])

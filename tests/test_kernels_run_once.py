"""What a kernel makes and the backward pass keeps: XLA could run the kernel twice for it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from fp4jax import implementation, recipes
from fp4jax.dot import dot_general
from fp4jax.moe_ffn import moe_ffn

SHAPE_OPS = ("stablehlo.reshape", "stablehlo.transpose", "stablehlo.bitcast_convert")
NAMES = ("bf16", "fp8", "fp8_pow2", "hopper_fp4")


def readers(value):
  """Operations that read `value`, in whatever shape."""
  for use in value.uses:
    operation = use.owner.operation
    yield from readers(operation.results[0]) if operation.name in SHAPE_OPS else (operation,)


def kept_and_read(lowered) -> list[str]:
  """Results of kernels that a function returns, to be kept, and that something else reads too."""
  functions = {f.name.value: f for f in lowered.compiler_ir("stablehlo").body.operations}
  operations = {
    name: [o.operation for o in f.regions[0].blocks[0].operations] for name, f in functions.items()
  }

  @functools.cache
  def of_kernels(name):
    """Which values of a function a kernel made, and which of its results they are."""
    made = []
    for operation in operations[name]:
      if operation.name == "func.call":
        inner = operation.attributes["callee"].value
        made += [operation.results[i] for i in of_kernels(inner)[1]]
      elif "call_target_name" in operation.attributes:
        is_kernel = "mosaic" in operation.attributes["call_target_name"].value
        made += operation.results if is_kernel else []
    returned = list(operations[name][-1].operands)
    return made, [i for v in made for i, r in enumerate(returned) if r == v]

  found = []
  for name in functions:
    for value in of_kernels(name)[0]:
      of_value = list(readers(value))
      if len(of_value) > 1 and "func.return" in [o.name for o in of_value]:
        found.append(f"{name}: {value.type}, read by {[o.name for o in of_value]}")
  return found


@pytest.fixture
def for_hopper(monkeypatch):
  monkeypatch.setattr(implementation, "compute_capability", lambda: "9.0")


def lower(f, *shapes):
  """f and what its backward pass keeps."""
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  traced = jax.jit(functools.partial(jax.vjp, f)).trace(*arguments)
  return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("name", NAMES)
def test_a_feed_forward_keeps_nothing_that_a_kernel_must_make_again(name, for_hopper):
  recipe = recipes.by_name(name)

  def layer(x, w13, w2, experts, weights):
    return moe_ffn(x, w13, w2, experts, weights, recipe, implementation="mosaic")

  tokens, d, f, k = 256, 256, 256, 2
  lowered = lower(
    lambda x, w13, w2, weights: layer(x, w13, w2, jnp.zeros((tokens, k), jnp.int32), weights),
    ((tokens, d), jnp.bfloat16),
    ((4, d, 2 * f), jnp.float32),
    ((4, f, d), jnp.float32),
    ((tokens, k), jnp.float32),
  )
  assert "mosaic_gpu" in lowered.as_text()
  assert kept_and_read(lowered) == []


@pytest.mark.parametrize("name", NAMES[1:])
def test_nor_does_a_product(name, for_hopper):
  product = dot_general(recipes.by_name(name), implementation="mosaic")

  def squared(x, w):
    y = product(x, w, (((1,), (0,)), ((), ())))
    return y * jax.nn.sigmoid(y)

  lowered = lower(squared, ((256, 256), jnp.bfloat16), ((256, 256), jnp.bfloat16))
  assert "mosaic_gpu" in lowered.as_text()
  assert kept_and_read(lowered) == []

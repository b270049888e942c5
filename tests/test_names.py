"""Formats, recipes and callables are values: equality, and names that say what runs."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

import fp4jax
from fp4jax import quantize, recipes, sharding

MATMUL = (((1,), (0,)), ((), ()))


def test_a_dot_general_is_a_value():
  dot, again = fp4jax.dot_general(recipes.MXFP4), fp4jax.dot_general(recipes.MXFP4)
  assert dot == again and hash(dot) == hash(again) and dot != fp4jax.dot_general(recipes.FP8)
  assert pickle.loads(pickle.dumps(dot)) == dot and copy.deepcopy(dot) == dot
  with pytest.raises(dataclasses.FrozenInstanceError):
    dot.recipe = recipes.FP8
  traces = []

  def f(dot, x):
    traces.append(dot)
    return dot(x, x, MATMUL)

  jitted = jax.jit(f, static_argnums=0)
  for d in (dot, again):
    jitted(d, jnp.ones((32, 32)))
  assert len(traces) == 1
  keyed = [fp4jax.dot_general(recipes.MXFP4_RHT_SR, key=jax.random.key(0)) for _ in range(2)]
  assert keyed[0] == keyed[0] != keyed[1] and not isinstance(keyed[0] == keyed[1], jax.Array)


def test_a_name_takes_no_part_in_equality():
  renamed = dataclasses.replace(fp4jax.MXFP4, name="other")
  assert renamed == fp4jax.MXFP4 and hash(renamed) == hash(fp4jax.MXFP4)
  assert recipes.MXFP4.replace({"name": "other", "citation": "ours"}) == recipes.MXFP4
  q = jax.lax.cond(
    True, lambda x: quantize(x, fp4jax.MXFP4), lambda x: quantize(x, renamed), jnp.ones(32)
  )
  assert q.codes.shape == (16,)


def test_a_changed_value_has_a_name_that_says_so():
  rceil = dataclasses.replace(fp4jax.MXFP4, scale_rule="rceil")
  assert rceil.name == "MXFP4[rceil]"
  assert dataclasses.replace(rceil, scale_rule="floor").name == "MXFP4"
  wide = dataclasses.replace(rceil, block_shape=(16,))
  assert wide.name == "MXFP4[block_shape=(16,), rceil]"
  assert dataclasses.replace(rceil, name="MINE").name == "MINE"
  mine = dataclasses.replace(fp4jax.MXFP4, name="MINE")
  assert dataclasses.replace(mine, scale_rule="oas").name == "MINE[oas]"
  recipe = recipes.MXFP4.replace({"wgrad.lhs.rounding": "stochastic"})
  assert recipe.name == "mxfp4[wgrad.lhs.rounding=stochastic]"
  assert recipe.replace({"wgrad.lhs.rounding": "nearest"}).name == "mxfp4"
  assert recipes.MXFP4.replace({"wgrad.lhs.format": rceil, "name": "mine"}).name == "mine"
  assert recipes.MXFP4.replace({"wgrad.lhs.format": rceil}).name.endswith("=MXFP4[rceil]]")
  for name, recipe in recipes.RECIPES.items():
    assert recipe.name == name


def test_a_call_that_nothing_traces_is_compiled_once_for_each_name():
  other = dataclasses.replace(fp4jax.MXFP4, name="other")
  x = jnp.ones(32)
  for fmt in (fp4jax.MXFP4, other):
    assert quantize(x, fmt).fmt.name == fmt.name
  before = sharding.compiled.cache_info()
  quantize(2 * x, fp4jax.MXFP4)
  after = sharding.compiled.cache_info()
  assert after.hits == before.hits + 1 and after.misses == before.misses

"""The blocks of a language model one at a time: what each reads, and what it makes of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp4jax import operands
from fp4jax.models import LanguageModel, Policy
from fp4jax.models.policy import Numerics

Params = Any  # an nnx.State, which annotations can't name: its base is a deprecated generic
LayerStates = dict[str, operands.State]  # by GEMM


def split_blocks(model: LanguageModel) -> tuple[nnx.GraphDef, list[Params]]:
  """Of one block, and the parameters of each."""
  graph, stacked = nnx.split(model.blocks)
  return graph, [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(model.num_layers)]


def with_blocks(model: LanguageModel, params: list[Params]) -> LanguageModel:
  """A copy with other parameters of its blocks; all others are shared."""
  copy = nnx.clone(model)
  nnx.update(copy.blocks, jax.tree.map(lambda *each: jnp.stack(each), *params))
  return copy


def stacked_states(states: list[LayerStates]) -> dict[str, LayerStates]:
  """As a model takes them, whose layers run one policy."""
  return {f"0:{len(states)}": jax.tree.map(lambda *each: jnp.stack(each), *states)}


def run_block(
  graph: nnx.GraphDef,
  policy: Policy,
  params: Params,
  states: LayerStates | None,
  x: Float[Array, "b t d"],
) -> Float[Array, "b t d"]:
  """Under a policy that is the same in all layers."""
  return nnx.merge(graph, params)(x, Numerics(policy, None, None, states))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def run_batches(graph, policy, params, states, x: Float[Array, "n t d"], batch: int):
  """`run_block` of n sequences, `batch` at a time, of which n is a multiple."""
  run = functools.partial(run_block, graph, policy, params, states)
  return jax.lax.map(run, x.reshape(-1, batch, *x.shape[1:])).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Recorder(Numerics):
  """Keeps what each GEMM with weights reads."""

  read: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

  def matmul(self, name, x, w):
    self.read[name] = x
    return super().matmul(name, x, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def record_block(
  graph: nnx.GraphDef, policy: Policy, params: Params, x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "b t k"]]]:
  """What a block makes of x, and what its GEMMs with weights read, by name."""
  recorder = _Recorder(policy)
  out, _ = nnx.merge(graph, params)(x, recorder)
  return out, recorder.read

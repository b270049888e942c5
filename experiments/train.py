"""Training of one model under one policy: pure, compiled functions of arrays, no files."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32, PyTree

from experiments.config import Experiment, Quantize
from experiments.mesh import BATCH, OnMesh, shardings
from experiments.optimizers import make_optimizer
from experiments.optimizers.norms import norm_of
from experiments.programs import compiled
from fp4jax import operands
from fp4jax.implementation import Implementation
from fp4jax.models import LanguageModel, LayerRule, Policy
from fp4jax.models.matrix import Matrix
from fp4jax.models.policy import KINDS
from fp4jax.recipe import Recipe

# Folded into a step's key, so that evaluation does not draw what training draws.
_EVALUATION = zlib.crc32(b"evaluation")
# Losses and the gradient norm; with experts, `expert_load` by layer and expert.
Scalars = dict[str, Float32[Array, "..."]]
Tokens = Int32[Array, "batch length_and_one"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that the next step depends on, besides its batch."""

  step: Int32[Array, ""]  # steps done
  params: Any  # float32
  opt_state: Any
  quantizers: Any = dataclasses.field(default_factory=dict)  # states, see `new_states`


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The compiled functions of one policy. Randomness comes from (seed, step) alone."""

  policy: Policy
  init: Callable[[Int32[Array, ""]], TrainState]
  step: Callable[[TrainState, Tokens, Int32[Array, ""]], tuple[TrainState, Scalars]]
  gradients: Callable[[TrainState, Tokens, Int32[Array, ""]], Any]  # shaped like `params`
  evaluate: Callable[..., Float32[Array, ""]]  # of (state, tokens, seed, number of the batch)
  probe: Callable[[TrainState, Tokens, Int32[Array, ""]], dict[str, operands.Tap]]
  saved_bytes: Callable[[Tokens], int]
  adopt: Callable[[TrainState], TrainState]  # a state of another policy


def policy_of(recipe: Recipe, config: Experiment) -> Policy:
  """`quantized_policy` over the mesh of `config`."""
  mesh = config.mesh
  return dataclasses.replace(
    quantized_policy(recipe, config.quantize, config.implementation),
    token_parts=mesh.token_parts or 1,
    capacity_factor=mesh.capacity_factor,
    exchange=mesh.exchange,
    weights_once=config.weights_once,
  )


def quantized_policy(
  recipe: Recipe, quantize: Quantize, implementation: Implementation | None
) -> Policy:
  """The recipe where `quantize` says so, high precision elsewhere."""
  kinds = [kind for kind in KINDS if getattr(quantize, kind)]
  ends = (*range(quantize.first_bf16), *range(-quantize.last_bf16, 0))
  rules = [
    LayerRule(layers=ends, modules=f"{kind}.*", recipe=getattr(Policy, kind))
    for kind in kinds
    if ends
  ]
  return Policy(**dict.fromkeys(kinds, recipe), implementation=implementation, layers=tuple(rules))


def schedule_of(config: Experiment, run: str) -> tuple[tuple[int, Policy], ...]:
  """The policies of the run of that name, each with the step from which it trains."""
  return tuple((step, policy_of(recipe, config)) for step, recipe in config.recipes_of(run))


def make_trainer(
  config: Experiment, vocab_size: int, policy: Policy, mesh: Mesh | None = None
) -> Trainer:
  """Functions that train `config.model` under `policy`; nothing is compiled before first use.

  With a mesh, `init` makes a state that lies as `experiments.mesh` says, and batches lie as
  `experiments.mesh.BATCH` says.
  """
  if mesh is not None and config.mesh.token_parts is None:
    policy = dataclasses.replace(policy, token_parts=mesh.size)
  make_model = functools.partial(LanguageModel, config.model, vocab_size)
  model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
  graph, _ = nnx.split(model)
  norm_of_grads = norm_of(model.unroll)
  optimizer = make_optimizer(config.optimizer, config.steps, matrices(model), norm_of_grads)
  taps = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.new_taps))

  def init(seed):
    params = nnx.split(make_model(nnx.Rngs(params=jax.random.key(seed))))[1]
    params = nnx.to_pure_dict(params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), model.new_states(policy))

  def adopt(state):
    """With first states for the quantizers of which `state` has none."""
    found = dict(jax.tree_util.tree_leaves_with_path(state.quantizers))

    def own(path, first):
      old = found.get(path)
      return first if old is None or old.shape != first.shape else old

    quantizers = jax.tree_util.tree_map_with_path(own, model.new_states(policy))
    if mesh is not None:
      quantizers = jax.device_put(quantizers, shardings(quantizers, mesh))
    return dataclasses.replace(state, quantizers=quantizers)

  def losses(params, quantizers, tokens, key, taps=None):
    """Mean cross-entropy in nats per token, and what the model says of its routing."""
    entropy, routing = nnx.merge(graph, params).cross_entropy(
      tokens[:, :-1], tokens[:, 1:], policy, key=key, taps=taps, states=quantizers
    )
    return jnp.mean(entropy), routing

  def total_loss(params, quantizers, tokens, key, taps=None):
    loss, routing = losses(params, quantizers, tokens, key, taps)
    weights = {
      "load_balance_loss": config.optimizer.load_balance_weight,
      "router_z_loss": config.optimizer.router_z_weight,
    }
    auxiliary = sum(weight * routing[name] for name, weight in weights.items() if name in routing)
    return loss + auxiliary, (loss, routing)

  parts = config.data.microbatches

  def divided(tokens):
    """A batch with its sequences divided among the devices."""
    if mesh is None:
      return tokens
    return jax.lax.with_sharding_constraint(tokens, NamedSharding(mesh, BATCH))

  def microbatches(tokens, key):
    """The parts of a batch, and a key for each."""
    each = jax.vmap(functools.partial(jax.random.fold_in, key))
    keys = key[None] if parts == 1 else each(jnp.arange(parts))
    return jax.vmap(divided)(tokens.reshape(parts, -1, tokens.shape[1])), keys

  def mean_gradients(state, tokens, key):
    """Means over the microbatches: loss and routing, gradients. The states of the quantizers go
    from one to the next."""
    # The "gradient" of the quantizers' states is their next states.
    run = jax.value_and_grad(total_loss, argnums=(0, 1), has_aux=True)
    if parts == 1:
      (_, said), (grads, quantizers) = run(state.params, state.quantizers, tokens, key)
      return said, grads, quantizers

    def add(carry, part):
      total, quantizers = carry
      (_, said), (grads, quantizers) = run(state.params, quantizers, *part)
      return (jax.tree.map(jnp.add, total, grads), quantizers), said

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    first = zeros, state.quantizers
    (total, quantizers), said = jax.lax.scan(add, first, microbatches(tokens, key))
    said = jax.tree.map(lambda x: jnp.mean(x, axis=0), said)
    return said, jax.tree.map(lambda x: x / parts, total), quantizers

  def step(state, tokens, seed):
    tokens = divided(tokens)
    (loss, routing), grads, quantizers = mean_gradients(state, tokens, _key(seed, state.step))
    with jax.named_scope("optimizer"):
      norm = norm_of_grads(grads)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      new = TrainState(state.step + 1, params, opt_state, quantizers)
      # A step that diverged changes nothing, so that its cause can still be looked at.
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)
      new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return new, {"loss": loss, "grad_norm": norm} | routing

  def gradients(state, tokens, seed):
    return mean_gradients(state, divided(tokens), _key(seed, state.step))[1]

  def evaluate(state, tokens, seed, batch=0):
    tokens, key = divided(tokens), jax.random.fold_in(_key(seed, state.step), _EVALUATION)
    loss_of = lambda part: losses(state.params, state.quantizers, *part)[0]  # noqa: E731
    key = jax.random.fold_in(key, batch)
    if parts == 1:
      return loss_of((tokens, key))
    return jnp.mean(jax.lax.map(loss_of, microbatches(tokens, key)))

  def probe(state, tokens, seed):
    """Taps at the first microbatch, with the numbers that a step draws for it."""
    tokens, key = (x[0] for x in microbatches(divided(tokens), _key(seed, state.step)))
    own = state.params, state.quantizers
    return jax.grad(lambda taps: total_loss(*own, tokens, key, taps)[0])(taps)

  def saved_bytes(tokens):
    def residuals(params, tokens):
      quantizers = model.new_states(policy)
      loss = lambda p: total_loss(p, quantizers, tokens, jax.random.key(0))[0]  # noqa: E731
      return jax.vjp(loss, params)[1]

    params = jax.eval_shape(init, jnp.int32(0)).params
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if _is_number(leaf))

  if mesh is None:
    places = params = everywhere = None
  else:
    places = shardings(jax.eval_shape(init, jnp.int32(0)), mesh)
    params, everywhere = places.params, NamedSharding(mesh, PartitionSpec())

  def on_mesh(function, out, jit=compiled, **options):
    if mesh is None:
      return jit(function, **options)
    return OnMesh(jit(function, out_shardings=out, **options), mesh)

  return Trainer(
    policy,
    on_mesh(init, places, jax.jit),
    on_mesh(step, (places, everywhere), donate_argnums=0),
    on_mesh(gradients, params),
    on_mesh(evaluate, everywhere),
    on_mesh(probe, everywhere),
    saved_bytes,
    adopt,
  )


def matrices(model: LanguageModel) -> PyTree[bool]:
  """Of each parameter, whether it is a `Matrix`."""
  is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
  found = jax.tree.map(lambda v: isinstance(v, Matrix), nnx.state(model), is_leaf=is_variable)
  return nnx.to_pure_dict(found)


def parameter_counts(config: Experiment, vocab_size: int) -> dict[str, int]:
  """All parameters, and those that one token meets: top_k experts each, and not the embedding table
  unless it is the head too."""
  model = nnx.eval_shape(lambda: LanguageModel(config.model, vocab_size, nnx.Rngs(0)))
  count = lambda state: sum(leaf.size for leaf in jax.tree.leaves(state))  # noqa: E731
  total = count(nnx.state(model))
  active = total - (0 if config.model.tied_embedding else count(nnx.state(model.embedding)))
  if config.model.num_experts:
    experts = model.blocks.feed_forward.w13.size + model.blocks.feed_forward.w2.size
    active -= experts // config.model.num_experts * (config.model.num_experts - config.model.top_k)
  return {"parameters": total, "active_parameters": active}


def saved_activation_bytes(trainer: Trainer, batch: int, length: int) -> float:
  """Bytes a token that the forward pass keeps for the backward pass, weights not counted.

  From the residuals of two batch sizes: what grows with the batch is activations.
  """
  sizes = [
    trainer.saved_bytes(jax.ShapeDtypeStruct((n, length + 1), jnp.int32))
    for n in (batch, 2 * batch)
  ]
  return (sizes[1] - sizes[0]) / (batch * length)


def _key(seed, step):
  return jax.random.fold_in(jax.random.key(seed), step)


def _is_number(leaf):
  return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)

"""EfficientQAT (arXiv 2407.11062): blocks trained one by one, then scales alone from end to end.

Block-AP trains the weights and scales of a block until its output is that of the block in bf16; it
reads what the quantized blocks before it make, its target comes of the bf16 ones. E2E-QP then keeps
the elements as they are, and trains scales alone on the loss of the whole model. Weights alone are
quantized. What the paper trains beside them, zero points, symmetric formats do not have.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from experiments.qat import blocks
from experiments.qat.distillation import Loss, Trained, mean_loss
from experiments.qat.evaluate import Student
from experiments.qat.policies import TEACHER, learned, policy_of
from fp4jax.formats import BlockFormat
from fp4jax.models import LanguageModel, Policy
from fp4jax.models.matrix import Matrix
from fp4jax.quantizers import LearnedScale, Operand

_ROLE = "fprop.rhs"


def scale_rate(fmt: BlockFormat, rate: float) -> float:
  """A learning rate of INT4's scales, as the paper has, for those of `fmt`: a step moves what the
  largest element stands for as far."""
  return rate * 7 / fmt.q_max


def rounded_student(model: LanguageModel, fmt: BlockFormat) -> Student:
  """With the scales that the format itself gives the weights, ready to learn them."""
  quantizer = LearnedScale(Operand(fmt))
  first = lambda w: jax.vmap(quantizer.first_state)(w[...].astype(model.dtype))  # noqa: E731
  states = {name: {_ROLE: first(w)} for name, w in model.blocks.matrices.items()}
  policy = policy_of(learned(fmt, frozen=False))
  return Student(model, policy, {f"0:{model.num_layers}": states})


def freeze(student: Student, fmt: BlockFormat) -> Student:
  """The same numbers, from weights that hold their elements."""
  quantizer, model = LearnedScale(Operand(fmt)), nnx.clone(student.model)
  (states,) = student.states.values()
  for name, w in model.blocks.matrices.items():
    values, state = w[...].astype(model.dtype), states[name][_ROLE]
    w.set_value(jax.vmap(quantizer.elements)(values, state))
  return Student(model, policy_of(learned(fmt, frozen=True)), student.states)


def block_ap(
  student: Student,
  tokens: np.ndarray,
  batch: int,
  epochs: int,
  scale_rate: float = 1e-4,
  weight_rate: float = 1e-5,
  seed: int = 0,
) -> tuple[Student, list[tuple[float, float]]]:
  """Trains block after block on windows (n, t); with the mean squared error of each block's output
  in its first and its last epoch, as the paper's loss has it.

  Adam, each rate falling as a cosine to a twentieth, orders drawn by `seed`. The student may have
  no scales to learn.
  """
  model, policy = student.model, student.policy
  if len(tokens) % batch:
    raise ValueError(f"{len(tokens)} windows are no multiple of {batch=}")
  graph, params = blocks.split_blocks(model)
  states = _layer_states(student)
  optimizer = _block_optimizer(scale_rate, weight_rate, epochs * len(tokens) // batch)
  rng, errors = np.random.default_rng(seed), []
  quantized = exact = model.embedding(jnp.asarray(tokens)).astype(model.dtype)
  for layer in range(model.num_layers):
    target = blocks.run_batches(graph, TEACHER, params[layer], None, exact, batch)
    trained = params[layer], states[layer]  # slices of the student's
    state, means = (trained, optimizer.init(trained)), []
    for _ in range(epochs):
      order = rng.permutation(len(tokens)).reshape(-1, batch)
      state, found = _epoch(graph, policy, optimizer, state, quantized, target, order)
      means.append(float(jnp.mean(found)))
    errors.append((means[0], means[-1]))
    params[layer], states[layer] = state[0]
    quantized = blocks.run_batches(graph, policy, *state[0], quantized, batch)
    exact = target
  return Student(blocks.with_blocks(model, params), policy, blocks.stacked_states(states)), errors


def _layer_states(student: Student) -> list[blocks.LayerStates]:
  layers = range(student.model.num_layers)
  (stacked,) = (student.states or {"": {}}).values()
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in layers]


@functools.cache
def _block_optimizer(scale_rate, weight_rate, steps) -> optax.GradientTransformation:
  """Of (parameters, scales): of the parameters, matrices alone."""
  falls = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.05))  # noqa: E731
  is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731

  def labels(trained):
    params, states = trained
    kind = lambda v: "matrix" if isinstance(v, Matrix) else "kept"  # noqa: E731
    of_params = jax.tree.map(
      lambda v: jax.tree.map(lambda _: kind(v), v), params, is_leaf=is_variable
    )
    return of_params, jax.tree.map(lambda _: "scale", states)

  rules = {"matrix": falls(weight_rate), "scale": falls(scale_rate), "kept": optax.set_to_zero()}
  return optax.multi_transform(rules, labels)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _epoch(graph, policy, optimizer, state, x, target, order):
  def step(state, rows):
    trained, opt_state = state
    error, grads = jax.value_and_grad(functools.partial(block_error, graph, policy))(
      trained, x[rows], target[rows]
    )
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    return (optax.apply_updates(trained, updates), opt_state), error

  return jax.lax.scan(step, state, order)


def block_error(
  graph: nnx.GraphDef,
  policy: Policy,
  trained: tuple[blocks.Params, blocks.LayerStates],
  x: Float[Array, "b t d"],
  target: Float[Array, "b t d"],
) -> Float32[Array, ""]:
  """Mean squared error of what a block makes of x."""
  found = blocks.run_block(graph, policy, *trained, x)
  return jnp.mean((found.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)


def e2e_qp(
  student: Student,
  teacher: LanguageModel,
  batches: Iterable[np.ndarray],
  optimizer: optax.GradientTransformation,
  loss: Loss = "cross_entropy",
) -> tuple[Student, Trained]:
  """Trains the scales of a frozen student; the paper's loss is that of the task, cross-entropy."""
  graph, params = nnx.split(student.model)
  options = graph, student.policy, optimizer, loss
  states = jax.tree.map(jnp.copy, student.states)  # a step takes its own
  state, losses, tokens = (states, optimizer.init(states)), [], 0
  weights = nnx.state(teacher)
  for batch in batches:
    state, value = _scale_step(*options, state, params, weights, batch)
    losses.append(value)
    tokens += batch[:, :-1].size
  trained = Trained(state[0], tokens, [float(x) for x in jax.device_get(losses)])
  return student._replace(states=state[0]), trained


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _scale_step(graph, policy, optimizer, loss, state, params, teacher, tokens):
  states, opt_state = state
  loss_of = lambda states: mean_loss(graph, policy, loss, params, states, teacher, tokens)  # noqa: E731
  value, grads = jax.value_and_grad(loss_of)(states)
  updates, opt_state = optimizer.update(grads, opt_state, states)
  return (optax.apply_updates(states, updates), opt_state), value

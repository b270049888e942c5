"""Each method as a student made of the pretrained model, with what that took."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.qat import coreset, efficient_qat, llm_fp4, policies
from experiments.qat.distillation import (
  MOST_GREEDY,
  Distillation,
  Trained,
  make_optimizer,
  own_text,
)
from experiments.qat.evaluate import Student
from experiments.qat.settings import Settings
from experiments.qat.source import Source
from fp4jax import formats, recipes
from fp4jax.formats import Format
from fp4jax.models import LanguageModel, Policy

_ROWS = 256  # of text that a model writes at once


class Case(NamedTuple):
  """One row to be."""

  method: str
  format: str  # of FORMATS, or what the method has of its own
  operands: str  # "weights" or "both"

  @property
  def activations(self) -> bool:
    return self.operands == "both"


class Made(NamedTuple):
  student: Student
  facts: dict[str, Any]  # of the row, beside what is asked of every one


def cases(methods: Sequence[str], names: Sequence[str], operands: Sequence[str]) -> Iterator[Case]:
  """In the order of the methods. Where a method has a format or operands of its own, those."""
  for method in methods:
    match method:
      case "bf16":
        yield Case(method, "bf16", "weights")
      case "mxfp4_weights":
        yield Case(method, recipes.FP8_MXFP4_WEIGHTS.name, "both")
      case "fp4_minmax" | "llm_fp4":
        yield from (Case(method, "LLM_FP4", side) for side in operands)
      case "block_ap" | "e2e_qp" | "efficient_qat":
        yield from (Case(method, name, "weights") for name in names)
      case _:
        yield from (Case(method, name, side) for name in names for side in operands)


def why_not(case: Case, settings: Settings) -> str | None:
  """Why there can be no such row; None where there can."""
  s = settings
  if case.method == "acs" and s.steps < s.acs_epochs:
    return f"steps={s.steps} are fewer than acs_epochs={s.acs_epochs}"
  if case.method == "llm_qat" and s.length <= MOST_GREEDY:
    return f"length={s.length} is not above the {MOST_GREEDY} likeliest tokens of LLM-QAT's text"
  return lacked_format(case)


def lacked_format(case: Case) -> str | None:
  """What its format lacks of what its method asks for."""
  if case.method not in ("block_ap", "e2e_qp", "efficient_qat"):
    return None
  fmt = formats.FORMATS[case.format]
  if isinstance(fmt, formats.BlockFormat) and len(fmt.block_shape or (1, 1)) == 1:
    return None
  return f"{case.method} learns scales of 1-D blocks, not of {case.format}"


def make(source: Source, case: Case) -> Made:
  return _MAKERS[case.method](source, case)


def _bf16(source, case):
  return Made(Student(source.model, policies.TEACHER), {})


def _rtn(source, case):
  return Made(Student(source.model, _nearest(case)), {})


def _nearest(case: Case) -> Policy:
  return policies.policy_of(policies.nearest(formats.FORMATS[case.format], case.activations))


def _llm_qat(source, case):
  s, key = source.settings, jax.random.key(source.settings.seed)
  count = s.steps * s.batch
  text = [
    own_text(source.model, min(_ROWS, count - start), s.length + 1, jax.random.fold_in(key, start))
    for start in range(0, count, _ROWS)
  ]
  return _distilled(source, _nearest(case), np.concatenate(jax.device_get(text)))


def _qad(source, case):
  return _distilled(source, _nearest(case), _train_windows(source))


def _mxfp4_weights(source, case):
  recipe = recipes.FP8_MXFP4_WEIGHTS
  made = _distilled(source, policies.policy_of(recipe), _train_windows(source))
  weights = _weights(recipe.residual.rhs)
  return made._replace(facts=made.facts | weights | {"activations": recipe.fprop.lhs.format.name})


def _train_windows(source: Source) -> np.ndarray:
  s = source.settings
  return source.train_windows(s.steps * s.batch, s.length)


def _distillation(source: Source, policy: Policy) -> Distillation:
  s = source.settings
  return Distillation(source.model, policy, make_optimizer(s.learning_rate, s.steps))


def _distilled(source: Source, policy: Policy, windows: np.ndarray) -> Made:
  batches = windows.reshape(-1, source.settings.batch, windows.shape[1])
  return _made(source, policy, _distillation(source, policy).train(batches))


def _made(source: Source, policy: Policy, trained: Trained) -> Made:
  model = nnx.clone(source.model)
  nnx.update(model, trained.params)
  return Made(Student(model, policy), _facts(trained))


def _facts(trained: Trained) -> dict[str, Any]:
  first, last = trained.losses[0], trained.losses[-1]
  return {"tokens_trained": trained.tokens, "first_loss": first, "last_loss": last}


def _acs(source, case):
  """As many steps as the others, or fewer by less than one for each epoch."""
  s, policy = source.settings, _nearest(case)
  steps = s.steps // s.acs_epochs
  pool = source.train_windows(round(steps * s.batch / s.acs_fraction), s.length)
  training = _distillation(source, policy)
  score = lambda share: coreset.window_scores(  # noqa: E731
    source.model, policy, training.params, pool, s.batch, share
  )
  batches = coreset.epochs_of(
    pool,
    score,
    s.acs_fraction,
    s.acs_epochs,
    s.acs_reselect,
    s.batch,
    np.random.default_rng(s.seed),
  )
  made = _made(source, policy, training.train(batches))
  selections = -(-s.acs_epochs // s.acs_reselect)
  scored = selections * len(pool) * s.length
  return made._replace(facts=made.facts | {"pool": len(pool), "tokens_scored": scored})


def _block_ap(source, case):
  student, facts = _block_trained(source, case)
  return Made(efficient_qat.freeze(student, _format(source, case)), facts)


def _block_trained(source, case):
  s, fmt = source.settings, _format(source, case)
  student = efficient_qat.rounded_student(source.model, fmt)
  windows = source.train_windows(s.block_windows, s.length)[:, :-1]
  student, errors = efficient_qat.block_ap(
    student,
    windows,
    s.block_batch,
    s.block_epochs,
    efficient_qat.scale_rate(fmt, s.block_scale_rate),
    s.block_weight_rate,
    s.seed,
  )
  of_blocks = {"tokens_trained": windows.size * s.block_epochs, "block_errors": errors}
  return student, of_blocks | _weights(fmt)


def _format(source: Source, case: Case) -> Format:
  if why := lacked_format(case):
    raise ValueError(why)
  fmt = formats.FORMATS[case.format]
  return policies.real_scales(fmt) if source.settings.real_scales else fmt


def _weights(fmt: Format) -> dict[str, Any]:
  return {"weights": fmt.name, "bits_per_value": fmt.bits_per_value}


def _e2e_qp(source, case):
  student = efficient_qat.rounded_student(source.model, _format(source, case))
  return _end_to_end(source, case, student, {})


def _efficient_qat(source, case):
  return _end_to_end(source, case, *_block_trained(source, case))


def _end_to_end(source, case, student, facts):
  s, fmt = source.settings, _format(source, case)
  windows = _train_windows(source)
  student, trained = efficient_qat.e2e_qp(
    efficient_qat.freeze(student, fmt),
    source.model,
    windows.reshape(-1, s.batch, windows.shape[1]),
    make_optimizer(efficient_qat.scale_rate(fmt, s.e2e_rate), s.steps),
    s.e2e_loss,
  )
  own = _facts(trained)
  own["tokens_trained"] += facts.get("tokens_trained", 0)
  return Made(student, facts | own | {"loss": s.e2e_loss} | _weights(fmt))


def _llm_fp4(source, case, **options):
  s = source.settings
  windows = source.train_windows(s.calibration_windows, s.length)[:, :-1]
  options = {"rounds": s.search_rounds} | options
  student, told = llm_fp4.quantize_model(source.model, windows, case.activations, **options)
  errors = [of_gemm["relative_error"] for of_gemm in told]
  found = {
    side: {name: sum(g[side] == name for g in told) for name in sorted({g[side] for g in told})}
    for side in ("weights", "activations")[: 1 + case.activations]
  }
  facts = {"tokens_calibrated": windows.size, "mean_relative_error": float(np.mean(errors))}
  bits = 4 + 32 * _columns_of_values(source.model)  # a float32 scale for each column of a matrix
  return Made(student, facts | {"found_formats": found, "bits_per_value": bits})


def _columns_of_values(model: LanguageModel) -> float:
  """Columns of the blocks' matrices for each of their values."""
  shapes = [w.shape for w in model.blocks.matrices.values()]  # (layer, k, n)
  return sum(math.prod(s[:-2]) * s[-1] for s in shapes) / sum(map(math.prod, shapes))


def _fp4_minmax(source, case):
  return _llm_fp4(source, case, deltas=llm_fp4.MINMAX, formats=(1,), rounds=1)


_MAKERS: dict[str, Callable[[Source, Case], Made]] = {
  "bf16": _bf16,
  "rtn": _rtn,
  "llm_qat": _llm_qat,
  "qad": _qad,
  "acs": _acs,
  "mxfp4_weights": _mxfp4_weights,
  "block_ap": _block_ap,
  "e2e_qp": _e2e_qp,
  "efficient_qat": _efficient_qat,
  "fp4_minmax": _fp4_minmax,
  "llm_fp4": _llm_fp4,
}

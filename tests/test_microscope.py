"""Parts of the error on single paths: what is measured, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rl_cases import small_rl

from experiments.programs import compiled
from experiments.rl.arms import PARTS, arm_of, arm_of_any_parts
from experiments.rl.microscope import (
  SUBSETS,
  distance,
  gradient_error,
  part_rows,
  states_of,
)
from experiments.rl.run import Setting
from experiments.tasks import Problem, TaskSettings
from experiments.train import quantized_policy
from fp4jax import recipes

KL = {"kl", "entropy", "entropy_gap", "token_mult_prob_error"}
FLIPS = {"router_flips/tokens", "router_flips/choices"}
GRADIENT = {"gradient_error", "cosine", "gradient_ratio"}
ANY = arm_of_any_parts("mxfp4")


def case():
  config = small_rl()
  setting = Setting.of(config)
  return config, setting, setting.source.params()


@pytest.mark.slow
def test_a_row_for_each_part_path_and_way_to_route():
  config, setting, params = case()
  sampled, *rows = part_rows(config, setting, params, subsets=SUBSETS[:2])
  assert sampled["path"] == "sampled" and sampled["answers"] == 12
  told = [(r["path"], r["replay"], set(r) - {"path", "base", "parts", "replay"}) for r in rows]
  of_one_part = [
    ("rollout", False, KL | FLIPS),
    ("forward", False, GRADIENT),
    ("backward", False, GRADIENT),
    ("rollout", True, KL),
    ("forward", True, GRADIENT),
  ]
  assert told == 2 * of_one_part
  for scale_bias, deadzone in zip(rows[:5], rows[5:], strict=True):
    assert (scale_bias["parts"], deadzone["parts"]) == (["scale_bias"], ["deadzone"])
    column = "kl" if scale_bias["path"] == "rollout" else "gradient_error"
    assert 0 < deadzone[column] < scale_bias[column] < 2
  assert [len(s) for s in SUBSETS] == [1, 1, 1, 2, 2, 2, 3]


def test_a_distance_is_that_of_the_two_distributions():
  config, setting, params = case()
  answers, _ = setting.learner(config, "bf16").collect(params, 0, 0)
  rollout, recipe = answers.rollout, arm_of("mxfp4").rollout
  graph, _ = nnx.split(setting.model)

  def logprobs(recipe):
    policy = quantized_policy(recipe, config.quantize, None)
    run = compiled(lambda p: nnx.merge(graph, p)(rollout.tokens[:, :-1], policy)[0])
    logits = np.asarray(run(params), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  own, base = logprobs(recipe), logprobs(recipes.BF16)
  mask, targets = np.asarray(rollout.mask), np.asarray(rollout.tokens[:, 1:])
  taken = lambda x: np.take_along_axis(x, targets[..., None], 2)[..., 0][mask]  # noqa: E731
  found = distance(setting.model, recipe, config.quantize, params, rollout, replay=False)
  entropy = lambda x: -(np.exp(x) * x).sum(-1)[mask].mean()  # noqa: E731
  expected = {
    "kl": (np.exp(own) * (own - base)).sum(-1)[mask].mean(),
    "entropy": entropy(own),
    "entropy_gap": entropy(own) - entropy(base),
    "token_mult_prob_error": np.exp(np.abs(taken(own) - taken(base))).mean(),
  }
  for name, value in expected.items():  # float32 sums of 256 terms of some nats
    assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
  assert found["kl"] > 1e-3 and found["router_flips/tokens"] > 0
  same = distance(setting.model, recipes.BF16, config.quantize, params, rollout, replay=False)
  assert same["kl"] == same["entropy_gap"] == same["router_flips/tokens"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("arm, parts", [("mxfp4", PARTS), ("mxfp4.deadzone", ("deadzone",))])
def test_chosen_parts_are_those_of_the_arm(arm, parts):
  """Up to the order in which two programs sum, which turns a bf16 rounding here and there."""
  config, setting, params = case()
  answers, _ = setting.learner(config, "bf16").collect(params, 0, 0)
  path = "forward" if arm == "mxfp4" else "backward"
  named, any_parts = (setting.learner(config, a) for a in (f"{arm}@{path}", ANY))
  expected = named.gradients(params, answers, 0)
  apart = []
  for chosen in (parts, ()):
    states = states_of(setting.model, any_parts.trainer.policy, path, chosen)
    found = any_parts.gradients(params, answers, 0, quantizers=states)
    apart.append(gradient_error(found, expected)["gradient_error"])
  assert apart[0] < 0.2 * apart[1] and apart[1] > 0.01


def test_a_distance_of_chosen_parts_is_that_of_the_arm():
  config, setting, params = case()
  answers, _ = setting.learner(config, "bf16").collect(params, 0, 0)
  own = config.quantize, params, answers.rollout, False
  expected = distance(setting.model, arm_of("mxfp4.deadzone").rollout, *own)
  assert distance(setting.model, ANY.rollout, *own, ("deadzone",)) == expected


def test_a_base_without_parts_is_refused_before_anything_is_sampled():
  rows = part_rows(small_rl(), Setting.of(small_rl()), None, base="mxpf4")
  with pytest.raises(ValueError, match=r"no base 'mxpf4'; did you mean .*mxfp4"):
    next(rows)


def test_the_error_of_a_gradient():
  g, h = ({"a": jnp.array(a), "b": jnp.array(b)} for a, b in (([3.0], [4.0]), ([3.0], [0.0])))
  assert gradient_error(h, g) == pytest.approx(
    {"gradient_error": 4 / 5, "cosine": 3 / 5, "gradient_ratio": 3 / 5}
  )
  assert gradient_error(g, g)["gradient_error"] == 0


def test_answers_that_are_all_worth_the_same_have_no_gradient():
  config = small_rl(task=TaskSettings("test_microscope:worthless", held_out=8))
  setting = Setting.of(config)
  with pytest.raises(ValueError, match="of the 3 questions are worth the same: there is no"):
    next(part_rows(config, setting, setting.source.params()))


def worthless(i):
  return Problem(str(i % 1000), "", lambda text: 0.0)

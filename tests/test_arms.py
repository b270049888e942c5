"""What the name of an arm says, and what its passes compute."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rl.arms import PARTS, PATHS, arm_of
from fp4jax import decompose, dot_general, fake_quantize, formats, recipes

MXFP4 = dataclasses.replace(formats.MXFP4, scale_rule="rceil")
DIMS = (((1,), (0,)), ((), ()))


def operands(m=64, k=128, n=32):
  x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(m, k), (k, n)]))
  dy = jax.random.normal(jax.random.key(2), (m, n))
  return tuple(a.astype(jnp.bfloat16) for a in (x, w, dy))


def gemms(recipe):
  """y, dx and dw of one layer."""
  x, w, dy = operands()
  y, vjp = jax.vjp(lambda x, w: dot_general(recipe, implementation="xla")(x, w, DIMS), x, w)
  return (y, *vjp(dy))


def product(a, b):
  """In float32, of values that bfloat16 holds or of their sums."""
  return np.asarray(a, np.float32) @ np.asarray(b, np.float32)


def close(found, expected):
  """Sums of 128 products, rounded to bfloat16."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(found, np.float32), expected, rtol=2**-8, atol=scale * 2**-8
  )


def test_w4a4_reads_both_operands_in_the_format_and_is_differentiated_straight_through():
  x, w, dy = operands()
  arm = arm_of("mxfp4")
  assert arm.rollout == arm.trainer
  qx, qw = fake_quantize(x, MXFP4), fake_quantize(w, MXFP4, axis=0)
  y, dx, dw = gemms(arm.trainer)
  close(y, product(qx, qw))
  close(dx, product(dy, np.asarray(qw).T))
  close(dw, product(np.asarray(qx).T, dy))


def test_a_path_leaves_the_others_in_bf16():
  x, w, dy = (np.asarray(a, np.float32) for a in operands())
  plain = x @ w, dy @ w.T, x.T @ dy
  forward, backward = (arm_of(f"mxfp4@{path}") for path in ("forward", "backward"))
  rollout = arm_of("mxfp4@rollout")
  assert rollout.trainer == recipes.BF16 and rollout.rollout == arm_of("mxfp4").rollout
  assert forward.rollout == backward.rollout == recipes.BF16
  y, dx, dw = gemms(forward.trainer)
  assert np.abs(np.asarray(y, np.float32) - plain[0]).max() > 0.5
  close(dx, plain[1])
  close(dw, plain[2])
  y, dx, dw = gemms(backward.trainer)
  close(y, plain[0])
  x, w, dy = operands()
  quantized = lambda a, axis: fake_quantize(a, MXFP4, axis=axis)  # noqa: E731
  close(dx, product(quantized(dy, 1), np.asarray(quantized(w, 1)).T))
  close(dw, product(np.asarray(quantized(x, 0)).T, quantized(dy, 0)))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_error_is_that_of_decompose(part):
  x, w, _ = operands()
  parts = [getattr(decompose(a, MXFP4, axis), part) for a, axis in ((x, 1), (w, 0))]
  y, _, _ = gemms(arm_of(f"mxfp4.{part}@forward").trainer)
  read = [np.asarray(a, np.float32) + np.asarray(e) for a, e in zip((x, w), parts, strict=True)]
  close(y, product(*read))


def test_all_parts_are_the_whole_error():
  parts = ".".join(PARTS)
  for path in PATHS:
    whole, together = arm_of(f"mxfp4@{path}"), arm_of(f"mxfp4.{parts}@{path}")
    for a, b in zip(gemms(whole.rollout), gemms(together.rollout), strict=True):
      np.testing.assert_array_equal(a, b)
    for a, b in zip(gemms(whole.trainer), gemms(together.trainer), strict=True):
      np.testing.assert_array_equal(a, b)


def test_the_corrections_combine():
  """Each makes the error of a product smaller; the noise is no part of a recipe."""
  x, w, _ = (np.asarray(a, np.float32) for a in operands())

  def error(name):
    y = np.asarray(gemms(arm_of(name).trainer)[0], np.float32)
    return np.square(y - x @ w).mean()

  found = {name: error(f"mxfp4{name}") for name in ("", "+mbs", "+of", "+mbs+of")}
  assert found["+mbs+of"] < found["+of"] < found["+mbs"] < found[""]
  assert arm_of("mxfp4+mbs+aqn").has_noise and not arm_of("mxfp4+mbs").has_noise
  assert arm_of("mxfp4+aqn").rollout == arm_of("mxfp4").rollout
  assert arm_of("mxfp4+of", alpha=1.0).trainer != arm_of("mxfp4+of").trainer


def test_other_bases_and_whole_recipes():
  assert arm_of("bf16").rollout == arm_of("bf16").trainer == recipes.BF16
  assert arm_of("hif4").rollout.fprop.lhs.format == formats.HIF4
  assert arm_of("recipe=hopper_fp4").trainer == recipes.HOPPER_FP4
  assert arm_of("bf16+aqn").has_noise
  names = [f"{b}{c}" for b, c in itertools.product(("nvfp4", "mxfp8"), ("", "+of", "@backward"))]
  assert len({arm_of(name).trainer for name in names}) == len(names)


@pytest.mark.parametrize(
  "name, words",
  [
    ("mxpf4", "no base 'mxpf4'; did you mean mxfp4"),
    ("mxfp4+mbs+mbs", "names 'mbs' twice"),
    ("mxfp4.dead", "did you mean deadzone"),
    ("mxfp4@roll", "no path 'roll'; did you mean rollout"),
    ("mxfp4@", "no path ''"),
    ("mxfp4.deadzone+of", "not defined"),
    ("bf16+of", "bf16 has no error"),
    ("bf16@rollout", "bf16 has no error"),
    ("bf16+aqn@rollout", r"its one variant is bf16\+aqn"),
    ("nvfp4+mbs", "plain E8M0, which nvfp4 does not have"),
    ("mxint8+mbs", "plain E8M0, which mxint8 does not have"),
    ("MXFP4+of", "capitals; did you mean 'mxfp4\\+of'"),
    ("mxfp4+aqn@forward", "there is none @forward"),
    ("recipe=mxfp5", "unknown recipe"),
    ("hopper_fp4", r"no base 'hopper_fp4'; did you mean recipe=hopper_fp4\?"),
    ("fp8", r"did you mean recipe=fp8\?"),
  ],
)
def test_names_that_say_nothing_are_refused(name, words):
  with pytest.raises(ValueError, match=words):
    arm_of(name)


def test_a_format_of_ones_own_is_a_base(monkeypatch):
  mine = dataclasses.replace(formats.MXFP4, name="MINE", scale_rule="even")
  monkeypatch.setitem(formats.FORMATS, "MINE", mine)
  assert arm_of("mine").trainer.fprop.lhs.format == mine

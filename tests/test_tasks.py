"""Problems with answers that a program can check."""

import pytest

from experiments.tasks import Problem, Problems, TaskSettings, answer_in, load_task


def few(i: int) -> Problem:
  """Ten questions in all."""
  return Problem(f"{i % 10}+1", str(i % 10 + 1))


def no_problem(i: int) -> str:
  return str(i)


def test_a_task_of_reasoning_gym_takes_its_options_and_scores_by_its_rules():
  task = load_task(TaskSettings("chain_sum", "min_terms=2,max_terms=2,max_digits=1"))
  for i in range(20):
    problem = task(i)
    expression = problem.question.split(":")[1].removesuffix("=")
    assert expression.count("+") + expression.count("-") == 1
    assert str(eval(expression)) == problem.answer
    assert problem.reward(problem.answer) == 1
    assert problem.reward(problem.answer + "1") < 1
  assert task(3).question == task(3).question != task(4).question


def test_a_task_of_ones_own_is_one_function():
  problem = load_task(TaskSettings("test_tasks:few"))(7)
  assert problem.question == "7+1"
  assert (problem.reward("8"), problem.reward("9")) == (1, 0)


def test_no_training_problem_is_held_out():
  problems = Problems(few, held_out=6)
  held_out = {p.question for p in problems.held_out}
  trained = {p.question for step in range(20) for p in problems.train(0, step, 8)}
  assert len(held_out) == 6
  assert trained == {f"{i}+1" for i in range(10)} - held_out


def test_training_problems_are_a_function_of_seed_and_step():
  problems = Problems(few, held_out=0)
  draw = lambda *at: [p.question for p in problems.train(*at, 16)]  # noqa: E731
  assert draw(0, 3) == draw(0, 3)
  assert draw(0, 3) != draw(0, 4)
  assert draw(0, 3) != draw(1, 3)


def test_what_is_taught_is_not_what_a_seed_trains_on():
  problems = Problems(lambda i: Problem(str(i), ""), held_out=1)
  at = [(seed, step) for seed in range(4) for step in range(20)]
  taught = {p.question for seed, step in at for p in problems.taught(seed, step, 8)}
  trained = {
    p.question for seed, step in at for draw in (0, 1) for p in problems.train(seed, step, 8, draw)
  }
  assert len(taught) == 4 * 20 * 8 and len(trained) == 2 * len(taught)
  assert not taught & trained


@pytest.mark.parametrize(
  "text, pattern, answer",
  [
    (" 12\n", None, "12"),
    ("3 or 14", r"\d+", "14"),
    ("<answer> 5 </answer>", r"<answer>(.*?)</answer>", "5"),
    ("none", r"\d+", ""),
    ("a", r"(b)?a", ""),
  ],
)
def test_the_answer_is_the_last_match(text, pattern, answer):
  assert answer_in(text, pattern) == answer


@pytest.mark.parametrize(
  "settings, words",
  [
    (TaskSettings("chain_sums"), "no generator of reasoning-gym; it has chain_sum"),
    (TaskSettings("test_tasks.few"), "a function of your own is test_tasks:few"),
    (TaskSettings("chain_sum", "terms=2"), "unexpected keyword argument 'terms'"),
    (TaskSettings("chain_sum", "min_terms=0"), "min_terms"),
    (TaskSettings("chain_sum", "2 terms"), "not a list such as"),
    (TaskSettings("test_tasks:many"), "has no attribute 'many'"),
    (TaskSettings("no_such_module:f"), "No module named"),
    (TaskSettings("test_tasks:no_problem"), "returns a Problem"),
    (TaskSettings("test_tasks:few", "a=1"), "reasoning-gym alone"),
  ],
)
def test_a_wrong_task_is_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    load_task(settings)


def test_too_few_questions_are_refused_with_their_numbers():
  with pytest.raises(ValueError, match="held_out=11 problems are more than the 10 questions"):
    Problems(few, held_out=11)
  with pytest.raises(ValueError, match="leaves no question to train on"):
    Problems(few, held_out=10).train(0, 0, 1)


def test_held_out_problems_are_told_by_all_that_they_say():
  first = Problems(few, held_out=5).sha256
  assert first == Problems(few, held_out=5).sha256
  for change in ({"answer": "other"}, {"example": "4"}, {"question": "Else?"}):
    other = lambda i, c=change: few(i)._replace(**c) if i == 3 else few(i)  # noqa: E731
    assert Problems(other, held_out=5).sha256 != first

"""What a run keeps and how it stops, with a state of one number and logs of its own."""

import signal
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_comparison import RATES, Tuning
from test_logs import events

from experiments import logs
from experiments.comparison import Names
from experiments.processes import Group
from experiments.session import Interrupted, RunSession
from experiments.workdir import Run, WorkDir

LOGS = ("metrics", "samples")
STEPS = 7
ARM = "../slow+twice@.5=a[b,c]*"


class Killed(Exception):
  """The process ends without another word."""


def a_run(folder) -> Run:
  return Run("slow", 1, folder)


def init() -> dict[str, Any]:
  return {"x": jnp.float32(1)}


def train(folder, stop_at=None, kill_at=None, group=None, **settings):
  """Halves a number and adds its step; returns it."""
  config, done = Tuning(**{"steps": STEPS, "checkpoint_every": 3} | settings), None
  asked = lambda: signal.SIGTERM if done is not None and done == stop_at else None  # noqa: E731
  with RunSession(a_run(folder), config, LOGS, asked, group or Group()) as session:
    done, state = session.restore(lambda step: jax.eval_shape(init), init)
    for step in range(done, STEPS):
      state = {"x": state["x"] / 2 + step}
      done = step + 1
      session.write("metrics", done, {"split": "train", "x": float(state["x"])})
      session.scalars(done, {"x": float(state["x"]), "unknown": None})
      if done % 2 == 0:
        session.write("samples", done, {"text": "a" * done})
      if done == kill_at:
        raise Killed
      session.end_step(done, state, session.stop())
    session.finish(done, diverged=False)
  return state["x"]


def rows_of(folder):
  return {name: (folder / f"{name}.jsonl").read_bytes() for name in LOGS}


def steps_saved(folder):
  return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def straight(tmp_path):
  return train(tmp_path / "straight"), rows_of(tmp_path / "straight")


def test_rows_tell_whose_they_are_in_logs_that_the_caller_names(tmp_path, straight):
  folder = tmp_path / "straight"
  assert logs.read_rows(folder / "samples.jsonl")[0] == {
    "recipe": "slow",
    "seed": 1,
    "step": 2,
    "text": "aa",
  }
  first = b'{"recipe":"slow","seed":1,"step":1,"split":"train","x":0.5}\n'
  assert straight[1]["metrics"].startswith(first)
  assert steps_saved(folder) == [6, 7] and a_run(folder).finished_at() == STEPS
  assert not (folder / "probes.jsonl").exists()
  (board,) = (folder / "tensorboard").iterdir()
  tags = {value.tag for event in events(board) for value in event.summary.value}
  assert tags == {"x"}


@pytest.mark.parametrize("end", [{"stop_at": 4}, {"kill_at": 2}, {"kill_at": 4}, {"kill_at": 7}])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, straight, end):
  folder = tmp_path / "resumed"
  with pytest.raises((Interrupted, Killed)):
    train(folder, **end)
  assert a_run(folder).finished_at() is None
  resumes_at = steps_saved(folder)[-1] if (folder / "checkpoints").exists() else 0
  assert (
    resumes_at
    == {"stop_at=4": 4, "kill_at=2": 0, "kill_at=4": 3, "kill_at=7": 6}[
      "{}={}".format(*next(iter(end.items())))
    ]
  )
  assert (train(folder), rows_of(folder)) == straight
  again = sorted((folder / "tensorboard").iterdir())[1]
  purge = [event.step for event in events(again) if event.HasField("session_log")]
  assert purge == ([resumes_at + 1] if resumes_at else [])


def test_a_signal_is_told_with_what_the_same_command_will_do(tmp_path):
  with pytest.raises(Interrupted, match=r"^slow-1 saved its state after step 2 and stopped; ") as e:
    train(tmp_path / "saved", stop_at=2)
  assert e.value.number == signal.SIGTERM
  with pytest.raises(Interrupted, match=r"^slow-1 stopped after step 2 without a checkpoint; the"):
    train(tmp_path / "not", stop_at=2, checkpoint_every=0)
  assert not (tmp_path / "not/checkpoints").exists()
  with (
    pytest.raises(Interrupted, match=r"^stopped before slow-1; the same command goes on"),
    RunSession(a_run(tmp_path / "before"), Tuning(), LOGS, lambda: signal.SIGINT, Group()),
  ):
    raise AssertionError
  assert not (tmp_path / "before").exists()
  train(tmp_path / "last", stop_at=STEPS)  # which had nothing left to stop
  assert a_run(tmp_path / "last").finished_at() == STEPS


def test_all_processes_stop_for_a_signal_to_one_of_them(tmp_path):
  class Two(Group):
    def gather(self, value):
      return [value, signal.SIGINT if value is None else value]

  session = RunSession(a_run(tmp_path), Tuning(), LOGS, lambda: None, Two())
  assert session.stop() == signal.SIGINT


def test_only_the_first_process_writes(tmp_path):
  first = Group()
  other = Group(index=1)
  other.gather = lambda value: [value]
  train(tmp_path / "first", group=first, checkpoint_every=0)
  train(tmp_path / "other", group=other, checkpoint_every=0)
  assert (tmp_path / "first").exists() and not (tmp_path / "other").exists()


def test_a_finished_run_without_its_checkpoint_is_refused(tmp_path):
  train(tmp_path, checkpoint_every=0)
  before = rows_of(tmp_path)
  with pytest.raises(ValueError, match=f"no checkpoint of its last step, {STEPS}, to go on from"):
    train(tmp_path)
  assert rows_of(tmp_path) == before


def test_what_was_not_finished_is_not_said_to_be(tmp_path):
  with RunSession(a_run(tmp_path), Tuning(), LOGS, lambda: None, Group()) as session:
    session.restore(lambda step: jax.eval_shape(init), init)
  assert a_run(tmp_path).finished_at() is None
  with (
    pytest.raises(ValueError, match="the disk is full"),
    RunSession(a_run(tmp_path), Tuning(), LOGS, lambda: None, Group()) as session,
  ):
    session.restore(lambda step: jax.eval_shape(init), init)
    session._checkpoints.close = _fails
    session.finish(3, diverged=False)
  assert a_run(tmp_path).finished_at() is None


def _fails():
  raise ValueError("the disk is full")


def test_a_state_is_saved_once_a_step_and_its_folder_may_have_any_arms_name(tmp_path, monkeypatch):
  monkeypatch.setitem(RATES, ARM, 1)
  (run,) = WorkDir(tmp_path, Tuning(arms=Names([ARM]))).runs
  with RunSession(run, Tuning(), LOGS, lambda: None, Group()) as session:
    session.restore(lambda step: jax.eval_shape(init), init)
    session.save(2, init())
    session.save(2, init())  # refused by Checkpoints, which has one of step 2
    session.finish(2, diverged=True)
  assert steps_saved(run.folder) == [2]
  with RunSession(run, Tuning(), LOGS, lambda: None, Group()) as session:
    step, state = session.restore(lambda step: jax.eval_shape(init), lambda: None)
    assert (step, float(state["x"])) == (2, 1.0)
    session.save(2, state)

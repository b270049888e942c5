"""The frame of a command that trains, around runs that train nothing."""

import errno
import io

import pytest
from test_comparison import Tuning

from experiments import logs, runner
from experiments.comparison import Distributed
from experiments.processes import Group
from experiments.session import Interrupted
from experiments.stop_signals import StopSignals
from experiments.workdir import WorkDir

ENVIRONMENT = {"tasks": {"sha256": "1"}, "versions": {}, "git_commit": None}


class Frame:
  """Runs the arms of `Tuning` in a folder; counts what it was asked for."""

  def __init__(self, path):
    self.path, self.trained, self.reports, self.steps = path, [], 0, None

  def train(self, run, progress):
    self.trained.append(run.name)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "metrics.jsonl").touch()
    run.finish(100, diverged=False)

  def report(self):
    self.reports += 1
    return self.path / "report.html"

  def make_progress(self, steps):
    self.steps = steps
    return logs.Progress(steps, 1, io.StringIO())

  def run(self, config, group=None):
    runner.train_unfinished(
      WorkDir(self.path, config),
      ENVIRONMENT,
      self.train,
      self.report,
      self.make_progress,
      StopSignals(),
      group or Group(),
    )


def test_only_what_is_not_finished_is_trained_then_reported(tmp_path, capsys):
  frame = Frame(tmp_path)
  frame.run(Tuning())
  assert (frame.trained, frame.steps, frame.reports) == (["slow-0", "fast-0"], 200, 1)
  frame.run(Tuning(seeds=2))
  assert (frame.trained[2:], frame.steps, frame.reports) == (["slow-1", "fast-1"], 200, 2)
  frame.run(Tuning())
  assert (len(frame.trained), frame.steps, frame.reports) == (4, 0, 3)
  assert capsys.readouterr().out == 3 * f"report: {tmp_path / 'report.html'}\n"


@pytest.mark.parametrize("report_fails", [False, True])
def test_a_failure_is_reported_and_told(tmp_path, report_fails):
  frame = Frame(tmp_path)

  def train(run, progress):
    raise OSError(errno.ENOSPC, "full")

  def report():
    frame.reports += 1
    if report_fails:
      raise OSError("no room for the report")

  frame.train, frame.report = train, report
  with pytest.raises(OSError, match="full"):
    frame.run(Tuning())
  assert frame.reports == 1
  folder = WorkDir(tmp_path, Tuning())
  with folder.claimed(folder.runs[0]) as mine:  # the lock is free
    assert mine


def test_processes_of_their_own_share_the_runs(tmp_path, capsys):
  """Each leaves to the other what it trains, and what it finished meanwhile."""
  one, other = Frame(tmp_path), Frame(tmp_path)
  train = one.train

  def while_one_trains(run, progress):
    if run.name == "slow-0":
      other.run(Tuning())
    train(run, progress)

  one.train = while_one_trains
  one.run(Tuning())
  assert (one.trained, other.trained) == (["slow-0"], ["fast-0"])
  said = capsys.readouterr().out.splitlines()
  report = f"report: {tmp_path / 'report.html'}"
  assert said == [f"{report} (so far: another process trains slow-0 in {tmp_path})", report]


def test_a_process_for_which_nothing_is_left_says_who_trains(tmp_path):
  folder = WorkDir(tmp_path, Tuning())
  with folder.claimed(folder.runs[0]), folder.claimed(folder.runs[1]) as mine:
    assert mine
    with pytest.raises(
      ValueError, match=r"another process trains slow-0, fast-0 in .*; wait until"
    ):
      Frame(tmp_path).run(Tuning())


def test_another_process_than_the_first_trains_and_writes_nothing(tmp_path, capsys):
  frame, group = Frame(tmp_path / "w"), Group(index=1)
  # What the first tells: what it trains, what is left, that this process may train it.
  said = iter([[{}], [["fast-0"]], [True]])
  group.gather = lambda value: next(said)
  frame.train = lambda run, progress: frame.trained.append(run.name)
  frame.run(Tuning(), group)
  assert (frame.trained, frame.steps, frame.reports) == (["fast-0"], 0, 0)
  assert not frame.path.exists() and not capsys.readouterr().out


def test_the_status_of_a_command_tells_the_signal(capsys):
  def stopped(group):
    raise Interrupted("saved", 15)

  with pytest.raises(SystemExit) as ended:
    runner.main(Distributed(), stopped)
  assert ended.value.code == 128 + 15 and capsys.readouterr().err == "\nsaved\n"
  with pytest.raises(SystemExit) as ended:
    runner.main(Distributed(), lambda group: None)
  assert ended.value.code == 0

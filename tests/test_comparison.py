"""What the runner does for an experiment that is none of pre-training."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments import checks
from experiments.comparison import Comparison, Names, field_paths, near_fields, plain_fields
from experiments.workdir import WorkDir

ROOT = Path(__file__).parents[1]
RATES = {"slow": 1, "fast": 2, "slow+twice@.5=a": 3}


@dataclasses.dataclass
class Group:
  """Settings of one experiment alone."""

  size: int = 4


@dataclasses.dataclass
class Tuning(Comparison):
  """Compares rates."""

  ARMS: ClassVar[str] = "arms"
  KEPT: ClassVar[dict[str, str]] = {"tasks.sha256": "tasks"}
  BY_ARM: ClassVar[tuple[str, ...]] = ("costs",)
  RANGES: ClassVar[checks.Ranges] = (("at least 2", lambda x: x >= 2, "group.size"),)

  arms: Names = Names(("slow", "fast"))  # noqa: RUF009, a tuple
  group: Group = dataclasses.field(default_factory=Group)

  def definitions(self) -> dict[str, Any]:
    return {name: {"rate": RATES[name]} for name in self.arms}


def begin(path, config, sha256="1", **costs):
  environment = {"tasks": {"sha256": sha256}, "device": "cpu", "costs": costs}
  WorkDir(path, config).begin(environment)


def test_a_workdir_grows_by_arms(tmp_path):
  begin(tmp_path, Tuning(arms=Names(["fast"])), fast=2.0)
  begin(tmp_path, Tuning(seeds=2, steps=200), slow=1.0)
  config, recipes, environment = (
    json.loads((tmp_path / f"{name}.json").read_text())
    for name in ("config", "recipes", "environment")
  )
  assert (config["arms"], config["seeds"], config["steps"]) == (["fast", "slow"], 2, 200)
  assert config["group"] == {"size": 4} and "distributed" not in config
  assert recipes == {"fast": {"rate": 2}, "slow": {"rate": 1}}
  assert environment["costs"] == {"fast": 2.0, "slow": 1.0}
  assert environment["resumed"] == [{"device": "cpu"}]


def test_a_workdir_refuses_other_arms_settings_and_data(tmp_path, monkeypatch):
  begin(tmp_path, Tuning(checkpoint_every=0))
  with pytest.raises(ValueError, match=r"config\.group\.size: 4 there, 5 here"):
    WorkDir(tmp_path, Tuning(checkpoint_every=0, group=Group(5)))
  with pytest.raises(ValueError, match="began with the tasks 1, not 2"):
    begin(tmp_path, Tuning(checkpoint_every=0), sha256="2")
  with pytest.raises(ValueError, match="can't go on to steps=200: checkpoint_every=0 keeps no"):
    WorkDir(tmp_path, Tuning(checkpoint_every=0, steps=200))
  monkeypatch.setitem(RATES, "fast", 5)
  with pytest.raises(ValueError, match=r"arms defined differently[^$]*\n  arms\.fast\.rate: 2 the"):
    WorkDir(tmp_path, Tuning(checkpoint_every=0))


def test_a_workdir_that_kept_less_goes_on(tmp_path):
  """As an earlier version left it."""
  begin(tmp_path, Tuning())
  path = tmp_path / "environment.json"
  earlier = {k: v for k, v in json.loads(path.read_text()).items() if k != "tasks"}
  path.write_text(json.dumps(earlier))
  begin(tmp_path, Tuning(), sha256="2")
  with pytest.raises(ValueError, match="began with the tasks 2, not 1"):
    begin(tmp_path, Tuning(), sha256="1")


def test_a_workdir_whose_config_is_lost_is_refused(tmp_path):
  begin(tmp_path, Tuning())
  (tmp_path / "config.json").unlink()
  begin(tmp_path, Tuning())  # nothing had begun
  (run, *_) = WorkDir(tmp_path, Tuning()).runs
  run.folder.mkdir(parents=True)
  (run.folder / "metrics.jsonl").touch()
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match="holds runs and no config"):
    WorkDir(tmp_path, Tuning())


def test_what_is_no_setting_is_refused():
  """An attribute of a dataclass can have any name."""
  config = Tuning()
  config.step = 3
  with pytest.raises(ValueError, match=r"there is no setting step; did you mean .*steps"):
    checks.validate_comparison(config)
  config = Tuning()
  config.group.sizes = 3
  with pytest.raises(ValueError, match=r"no setting group\.sizes; did you mean group\.size or"):
    checks.validate_comparison(config)
  config.group = Group()
  config.zzz = 3
  with pytest.raises(ValueError, match=r"there is no setting zzz$"):
    checks.validate_comparison(config)


def test_runs_have_the_names_of_arms_and_folders_that_a_file_system_takes(tmp_path, monkeypatch):
  config = Tuning(arms=Names(["slow+twice@.5=a"]), seeds=2)
  assert [run.name for run in WorkDir(tmp_path, config).runs] == [
    "slow+twice@.5=a-0",
    "slow+twice@.5=a-1",
  ]
  for name, folder in (
    ("slow+twice@.5=a", "slow+twice@.5=a-0"),
    ("a[b=c,d]", "a%5Bb=c,d%5D-0"),
    ("../a:b*", "..%2Fa%3Ab%2A-0"),
  ):
    monkeypatch.setitem(RATES, name, 0)
    (run,) = WorkDir(tmp_path, Tuning(arms=Names([name]))).runs
    assert run.recipe == name and run.folder == tmp_path / "runs" / folder


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seeds": 0}, "seeds=0 is not from 1 to 1000"),
    ({"steps": 0}, "steps=0 is not from 1 to 2147483647"),
    ({"steps": 1.5}, "steps=1.5 is not of type int"),
    ({"log_every": 0}, "log_every=0 is not at least 1"),
    ({"probe_every": -1}, "probe_every=-1 is not at least 0"),
    ({"arms": Names()}, "arms is empty; name at least one, such as slow"),
    ({"arms": Names(["slow", "slow"])}, "arms slow,slow names one twice"),
    ({"arms": "slow"}, "arms='slow' is not a list of names"),
    ({"implementation": "cuda"}, "implementation='cuda' is not 'mosaic' or 'xla'"),
    ({"implementation": "mosaic"}, "probe_every=20: probes read the tensors of"),
    ({"group": Group(1)}, "group.size=1 is not at least 2"),
    ({"group": Group("4")}, "group.size='4' is not of type int"),
  ],
)
def test_senseless_settings_are_refused(changes, message):
  checks.validate_comparison(Tuning(), Tuning.RANGES)
  with pytest.raises(ValueError, match=re.escape(message)):
    checks.validate_comparison(Tuning(**changes), Tuning.RANGES)


def test_what_has_no_fields_can_not_be_told():
  class Plain:
    pass

  with pytest.raises(ValueError, match=r"tells Plain by its fields, and it has none; make it a"):
    plain_fields(Plain())


def test_settings_are_those_of_the_class():
  paths = field_paths(Tuning)
  assert {"arms", "seeds", "group.size", "distributed.process_id"} <= set(paths)
  assert not {"ARMS", "KEPT", "recipes"} & set(paths)
  assert near_fields("grop.size", Tuning)[0] == "group.size"


COMMAND = """
import sys
from absl import app
from experiments import command_line
from test_comparison import Tuning
_CONFIG = command_line.define_config(Tuning, example="configs/tuning.py")
app.run(lambda _: print(_CONFIG.value.group.size), flags_parser=command_line.parse_flags)
"""
FILE = "from test_comparison import Tuning\ndef get_config():\n  return Tuning()\n"


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--config={}/tuning.py", "--config.group.size=7"], "7\n"),
    ([], "error: --config is needed, such as --config=configs/tuning.py\n"),
    (["--config={}/tuning.py", "--group.size=7"], "did you mean --config.group.size?\n"),
    (["--config={}/tuning.py", "--config.group.sise=7"], "did you mean --config.group.size?\n"),
    (["--config={}/tuning.py", "--config.recipes=bf16"], "error: there is no --config.recipes; "),
    (
      ["--config=configs/demo.py", "--config.group.size=7"],
      "--config makes no Tuning: there is no",
    ),
    (["--config=configs/demo.py"], "the file of --config makes no Tuning: it makes Experiment\n"),
    (
      ["--config=experiments/gaps.py"],
      "error: the file of --config has no function get_config, which makes the config\n",
    ),
    (["--help"], "--config.group.size=4\n"),
  ],
)
def test_the_command_line_knows_the_settings_of_its_experiment(tmp_path, arguments, said):
  (tmp_path / "tuning.py").write_text(FILE)
  done = subprocess.run(
    [sys.executable, "-c", COMMAND, *(a.format(tmp_path) for a in arguments)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert said in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr

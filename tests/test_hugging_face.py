import importlib.util
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hugging_face_oracle import CONFIGS, LLAMA, QWEN3_MOE, logits, new_arrays, write

from fp4jax import recipes
from fp4jax.models import ModelConfig, Policy
from fp4jax.models.hugging_face import load_hugging_face

FP32 = Policy(*([recipes.FP32] * 5))
TOKENS = np.random.default_rng(1).integers(0, 50, (3, 24))


def computed(folder):
  _, model = load_hugging_face(folder, dtype="float32")
  return np.asarray(model(jnp.asarray(TOKENS), FP32)[0])


def leaves(model):
  return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_definition(tmp_path, name):
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  expected = np.stack([logits(config, arrays, tokens) for tokens in TOKENS])
  # Nine products in a row, each of at most 64 float32 terms, whose roundings add up like a random
  # walk: 9 * sqrt(64) * 2^-24 = 4e-6 of the largest.
  found = computed(write(tmp_path, config, arrays))
  np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_array_matters(name):
  """To the definition, so that the test above sees each of them."""
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  expected = logits(config, arrays, TOKENS[0])
  for key, array in arrays.items():
    if ".experts." in key:  # may be nobody's choice
      continue
    changed = logits(config, arrays | {key: np.roll(array, 1, axis=0)}, TOKENS[0])
    assert np.abs(changed - expected).max() > 0.01 * np.abs(expected).max(), key


@pytest.mark.parametrize("name", ["llama", "qwen3 moe"])
def test_shards_are_the_whole(tmp_path, name):
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  _, whole = load_hugging_face(write(tmp_path / "whole", config, arrays))
  _, shards = load_hugging_face(write(tmp_path / "shards", config, arrays, shards=3))
  jax.tree.map(np.testing.assert_array_equal, leaves(whole), leaves(shards))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_16_bits_become_float32_as_they_are(tmp_path, dtype):
  rounded = {key: array.astype(dtype) for key, array in new_arrays(LLAMA).items()}
  as_float32 = {key: array.astype(np.float32) for key, array in rounded.items()}
  _, model = load_hugging_face(write(tmp_path / "16", LLAMA, rounded))
  _, expected = load_hugging_face(write(tmp_path / "32", LLAMA, as_float32))
  jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(expected))
  assert {leaf.dtype for leaf in jax.tree.leaves(leaves(model))} == {np.dtype("float32")}


def test_the_config_is_that_of_transformers_4_and_5(tmp_path):
  expected = ModelConfig(
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    num_experts=6,
    top_k=2,
    d_ff=20,
    rope_theta=100.0,
    qk_norm=True,
    norm_eps=1e-3,
    dtype="bfloat16",
  )
  arrays = new_arrays(QWEN3_MOE)
  assert load_hugging_face(write(tmp_path, QWEN3_MOE, arrays))[0] == expected
  five = {key: QWEN3_MOE[key] for key in QWEN3_MOE.keys() - {"rope_theta", "num_experts"}}
  five |= {"num_local_experts": 6, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
  assert load_hugging_face(write(tmp_path, five, arrays))[0] == expected


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
  full = LLAMA | {"num_key_value_heads": 4, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
  arrays = new_arrays(full)
  left_out = {"num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"}
  short = {key: full[key] for key in full.keys() - left_out}
  expected = load_hugging_face(write(tmp_path, full, arrays))[0]
  assert load_hugging_face(write(tmp_path, short, arrays))[0] == expected
  assert expected.num_kv_heads == 4 and not expected.tied_embedding


def test_a_stored_copy_of_a_tied_head_and_old_buffers_are_left_out(tmp_path):
  tied = LLAMA | {"tie_word_embeddings": True}
  arrays = new_arrays(tied)
  expected = computed(write(tmp_path / "without", tied, arrays))
  table = arrays["model.embed_tokens.weight"]
  more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  more["lm_head.weight"] = table.copy()
  np.testing.assert_array_equal(computed(write(tmp_path / "with", tied, arrays | more)), expected)
  more["lm_head.weight"] = table + 1
  with pytest.raises(ValueError, match=r"'lm_head\.weight' is not 'model\.embed_tokens\.weight'"):
    load_hugging_face(write(tmp_path / "other", tied, arrays | more))


def test_it_runs_under_a_recipe(tmp_path):
  _, model = load_hugging_face(write(tmp_path, LLAMA, new_arrays(LLAMA)))
  bf16, _ = model(jnp.asarray(TOKENS), Policy())
  mxfp4, _ = model(jnp.asarray(TOKENS), Policy(experts=recipes.MXFP4))
  assert np.isfinite(mxfp4).all() and (mxfp4 != bf16).mean() > 0.9


@pytest.mark.parametrize(
  "change, message",
  [
    ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not one of LlamaForCausalLM"),
    ({"architectures": None}, "architecture None is not one of"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu'; the model computes 'silu' alone"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' in layer_type"),
    ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=.*mxfp4"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling=.*scales no positions"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling=.*yarn"),
    (
      {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
      "rope_parameters=.*llama3",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
      "rope_parameters=.*linear",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
      {"vocab_size": 51},
      r"'model\.embed_tokens\.weight' is \(50, 32\), the model takes \(51, 32\)",
    ),
    ({"num_hidden_layers": 3}, r"'model\.layers\.2\..*\(and 8 more\) is missing"),
    ({"num_hidden_layers": 1}, r"'model\.layers\.1\..*\(and 8 more\) has no place in the model"),
    (
      {"num_key_value_heads": 1},
      r"'model\.layers\.0\.self_attn\.k_proj\.weight' is \(16, 32\), the model takes \(8, 32\)",
    ),
    ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
    ({"tie_word_embeddings": True}, r"'lm_head\.weight' is not 'model\.embed_tokens\.weight'"),
  ],
)
def test_what_the_model_does_not_compute_is_refused(tmp_path, change, message):
  write(tmp_path, LLAMA | change, new_arrays(LLAMA))
  with pytest.raises(ValueError, match=message) as caught:
    load_hugging_face(tmp_path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_experts", "num_experts_per_tok", "vocab_size"])
def test_a_setting_that_is_missing_is_named(tmp_path, key):
  config = {name: QWEN3_MOE[name] for name in QWEN3_MOE.keys() - {key}}
  with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
    load_hugging_face(write(tmp_path, config, new_arrays(QWEN3_MOE)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3 moe"])
def test_each_array_that_is_missing_or_of_another_shape_is_named(tmp_path, name):
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  for i, (key, array) in enumerate(arrays.items()):
    if ".layers.0." in key:  # as layer 1
      continue
    others = {other: arrays[other] for other in arrays.keys() - {key}}
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
      load_hugging_face(write(tmp_path / f"{i} missing", config, others))
    cut = others | {key: array[:-1].copy()}
    with pytest.raises(ValueError) as caught:
      load_hugging_face(write(tmp_path / f"{i} cut", config, cut))
    said = f"'{key}' is {cut[key].shape}, the model takes {array.shape}"
    assert str(caught.value).endswith(said)


def test_arrays_that_have_no_place_are_named(tmp_path):
  arrays = new_arrays(LLAMA)
  bias = {"model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)}
  with pytest.raises(ValueError, match=r"1\.self_attn\.q_proj\.bias' has no .* has no biases"):
    load_hugging_face(write(tmp_path / "bias", LLAMA, arrays | bias))
  codes = {"model.norm.weight": np.ones(32, np.int8)}
  with pytest.raises(ValueError, match=r"'model\.norm\.weight' is I8, not one of"):
    load_hugging_face(write(tmp_path / "codes", LLAMA, arrays | codes))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
  folder = write(tmp_path, LLAMA, new_arrays(LLAMA), shards=2)
  file = folder / "model-00002-of-00002.safetensors"
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  with pytest.raises(ValueError, match=file.name):
    load_hugging_face(folder)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"index\.json lists 'model-00002-of"):
    load_hugging_face(folder)
  index = folder / "model.safetensors.index.json"
  index.write_text('{"metadata": {}}')
  with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
    load_hugging_face(folder)
  index.write_text('{"weight_map": ')
  with pytest.raises(ValueError, match=r"index\.json is damaged"):
    load_hugging_face(folder)
  index.unlink()
  with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no model"):
    load_hugging_face(folder)
  (folder / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"config\.json is damaged: \[\] is not an object"):
    load_hugging_face(folder)
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    load_hugging_face(folder)


@pytest.fixture(scope="module")
def transformers():
  """An implementation that shares nothing with ours; of the extra `hf`."""
  for package in ("torch", "transformers"):
    if not importlib.util.find_spec(package):
      pytest.skip(f"needs {package}: pip install '.[hf]'")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, while it is imported
    import transformers
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return transformers


def by_transformers(transformers, folder):
  import torch

  model, found = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="float32", output_loading_info=True
  )
  assert not any(found.values()), found  # it knows every name, and misses none
  with torch.no_grad():
    return model, model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(tmp_path, transformers, name):
  """Both are float32 and sum the same terms in other orders: their errors are of one size, which
  that of transformers tells, measured on the definition in float64."""
  config, arrays = CONFIGS[name], new_arrays(CONFIGS[name])
  exact = np.stack([logits(config, arrays, tokens) for tokens in TOKENS])
  _, theirs = by_transformers(transformers, write(tmp_path, config, arrays))
  error = np.abs(theirs - exact).max()
  assert error < 4e-6 * np.abs(exact).max()
  np.testing.assert_allclose(computed(tmp_path), theirs, rtol=0, atol=4 * error)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_size", ["1MB", "10KB"])
def test_what_transformers_writes_is_what_it_read(tmp_path, transformers, name, shard_size):
  first = write(tmp_path / "first", CONFIGS[name], new_arrays(CONFIGS[name]))
  model, _ = by_transformers(transformers, first)
  model.save_pretrained(tmp_path / "second", max_shard_size=shard_size)
  assert (tmp_path / "second/model.safetensors").exists() == (shard_size == "1MB")
  (was, ours), (config, again) = load_hugging_face(first), load_hugging_face(tmp_path / "second")
  assert config == was
  jax.tree.map(np.testing.assert_array_equal, leaves(again), leaves(ours))

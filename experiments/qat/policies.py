"""The recipes under which a pretrained model is quantized: attention projections and feed-forward
blocks, the head in bf16."""

import dataclasses

import jax.numpy as jnp

from experiments.config import Quantize
from experiments.train import quantized_policy
from fp4jax import recipes
from fp4jax.formats import FP32, BlockFormat, Format
from fp4jax.formats.llm_fp4 import FP4_E2M1
from fp4jax.models import Policy
from fp4jax.quantizers import LearnedScale, Operand, PreShifted, Quantizer
from fp4jax.recipe import Recipe

TEACHER = Policy()  # bf16 in all


def policy_of(recipe: Recipe) -> Policy:
  return quantized_policy(recipe, Quantize(), None)


def nearest(fmt: Format, activations: bool) -> Recipe:
  """Weights in `fmt`, with `activations` those too. The backward pass is straight through and reads
  what fprop read, in the dtype that holds the format's values; gradients are bf16."""
  changes = _weights(Operand(fmt), jnp.dtype(fmt.dequantized_dtype))
  if activations:
    changes |= _activations(Operand(fmt), jnp.dtype(fmt.dequantized_dtype))
  return _bf16_but(changes, f"{fmt.name}{'' if activations else ' weights'}")


def learned(fmt: BlockFormat, frozen: bool) -> Recipe:
  """Weights of learned scales, `frozen` those that hold their elements; activations in bf16."""
  changes = _weights(LearnedScale(Operand(fmt), frozen), jnp.dtype(jnp.float32))
  return _bf16_but(changes, f"{fmt.name} weights of learned scales")


def real_scales(fmt: BlockFormat) -> BlockFormat:
  """Its elements and blocks, with a float32 scale for each block and none for the tensor."""
  return dataclasses.replace(fmt, scale_dtype=FP32, scale_rule="nearest", has_tensor_scale=False)


def llm_fp4(activations: bool) -> Recipe:
  """What `experiments.qat.llm_fp4` found: elements, and scales of columns as states."""
  changes = _weights(LearnedScale(Operand(FP4_E2M1), frozen=True), jnp.dtype(jnp.float32))
  if activations:
    changes |= _activations(PreShifted(), jnp.dtype(jnp.float32))
  return _bf16_but(changes, f"LLM-FP4{'' if activations else ' weights'}")


def _weights(quantizer: Quantizer, dtype: jnp.dtype) -> dict:
  return {"fprop.rhs": quantizer, "dgrad.rhs": Operand(dtype, source="fprop")}


def _activations(quantizer: Quantizer, dtype: jnp.dtype) -> dict:
  return {"fprop.lhs": quantizer, "wgrad.lhs": Operand(dtype, source="fprop")}


def _bf16_but(changes: dict, name: str) -> Recipe:
  return recipes.BF16.replace(changes | {"name": name, "citation": "experiments.qat"})

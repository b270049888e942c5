"""Flax NNX language models whose every GEMM runs the recipe that a policy gives it."""

from fp4jax.models.generation import Generated, generate
from fp4jax.models.language_model import LanguageModel, ModelConfig
from fp4jax.models.moe import MoE, Routing, route
from fp4jax.models.packing import can_pack, pack_model
from fp4jax.models.policy import LayerRule, Numerics, Policy

__all__ = [
  "Generated",
  "LanguageModel",
  "LayerRule",
  "MoE",
  "ModelConfig",
  "Numerics",
  "Policy",
  "Routing",
  "can_pack",
  "generate",
  "pack_model",
  "route",
]

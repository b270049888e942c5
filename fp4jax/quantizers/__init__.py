"""Quantizers: how an operand of a GEMM is read. `quantizer.py` says what one is."""

from fp4jax.quantizers.delayed import DelayedScaling
from fp4jax.quantizers.dge import DifferentiableEstimator
from fp4jax.quantizers.eden import EDEN, NVFP4_EDEN, EdenFormat
from fp4jax.quantizers.error_parts import ErrorParts
from fp4jax.quantizers.fallback import OutlierFallback
from fp4jax.quantizers.grad_scale import GradScale
from fp4jax.quantizers.learned_scale import LearnedScale
from fp4jax.quantizers.llm_fp4 import PreShifted
from fp4jax.quantizers.occ import OutlierClamp
from fp4jax.quantizers.q_ema import QEma
from fp4jax.quantizers.quantizer import Composed, Context, Operand, Quantizer, Read, Source
from fp4jax.quantizers.quest import MXFP4_QUEST, DeviationFormat, Quest
from fp4jax.quantizers.transform import FreshHadamard, Hadamard, Transform
from fp4jax.quantizers.tseng import MXFP4_THREE_QUARTERS, ThreeQuarters

__all__ = [
  "EDEN",
  "MXFP4_QUEST",
  "MXFP4_THREE_QUARTERS",
  "NVFP4_EDEN",
  "Composed",
  "Context",
  "DelayedScaling",
  "DeviationFormat",
  "DifferentiableEstimator",
  "EdenFormat",
  "ErrorParts",
  "FreshHadamard",
  "GradScale",
  "Hadamard",
  "LearnedScale",
  "Operand",
  "OutlierClamp",
  "OutlierFallback",
  "PreShifted",
  "QEma",
  "Quantizer",
  "Quest",
  "Read",
  "Source",
  "ThreeQuarters",
  "Transform",
]

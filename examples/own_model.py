"""Recipes in your own model: plain JAX, Flax, a mixture of experts, a recipe of your own.

.venv/bin/python examples/own_model.py
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import fp4jax
from fp4jax import recipes

STOCHASTIC = recipes.MXFP4_RHT_SR  # rounds gradients stochastically: wants a key, another each step
key = jax.random.key(0)
x = jax.random.normal(key, (256, 128))  # tokens, features


# Plain JAX: a drop-in for lax.dot_general, whose gradients run the recipe too.
def loss(w, step):
  dot = fp4jax.dot_general(STOCHASTIC, key=jax.random.fold_in(key, step))
  return jnp.mean(dot(x, w, (((1,), (0,)), ((), ()))) ** 2)


gradient = jax.jit(jax.grad(loss))(jnp.ones((128, 64)), 0)


# A tap's "gradient" is the error of each operand that the recipe rounds, in that very pass.
def tapped(w, tap):
  dot = fp4jax.dot_general(STOCHASTIC, key=key, tap=tap)
  return jnp.mean(dot(x, w, (((1,), (0,)), ((), ()))) ** 2)


tap = jax.jit(jax.grad(tapped, argnums=1))(jax.random.normal(key, (128, 64)), fp4jax.new_tap())
for role, summary in fp4jax.read_tap(tap, STOCHASTIC).items():
  print(f"{role}: {summary.sqnr_db:.1f} dB, deadzone {summary.deadzone:.0%} of the squared error")


# Flax Linen: the key comes from the stream "rounding".
class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(64, dot_general=fp4jax.dot_general(recipes.MXFP4))(x)
    return nn.Dense(64, dot_general=fp4jax.dot_general(STOCHASTIC, key=self.make_rng("rounding")))(
      x
    )


block = Block()
params = block.init({"params": key, "rounding": key}, x)
for step in range(2):
  y = block.apply(params, x, rngs={"rounding": jax.random.fold_in(key, step)})

# Flax NNX: a layer with its own stream, apart from the one that makes the weights.
rngs = nnx.Rngs(0, rounding=1)
layer = nnx.Linear(128, 64, dot_general=fp4jax.nnx.DotGeneral(STOCHASTIC, rngs), rngs=rngs)
y = layer(x)

# A mixture of experts: SwiGLU between two grouped GEMMs, top-2 of 4 experts.
w13, w2 = (jax.random.normal(key, shape) / 16 for shape in ((4, 128, 2 * 128), (4, 128, 128)))
weights, experts = jax.lax.top_k(jax.nn.softmax(x[:, :4]), 2)
y = fp4jax.moe_ffn(x, w13, w2, experts, weights, recipes.HOPPER_FP4)

# A format and a recipe of your own are values.
rceil = dataclasses.replace(fp4jax.MXFP4, name="MXFP4_RCEIL", scale_rule="rceil")
mine = recipes.MXFP4.replace(
  {
    "name": "mine",
    "citation": "MXFP4 with truncation-free scales of the gradients",
    "dgrad.lhs.format": rceil,
    "wgrad.rhs.format": rceil,
  }
)
y = fp4jax.dot_general(mine)(x, jnp.ones((128, 64)), (((1,), (0,)), ((), ())))

packed = fp4jax.quantize(x, rceil)
error = fp4jax.decompose(x, rceil).summary()
print(f"{x.nbytes} bytes are {packed.nbytes} in {rceil.name}, at {error.sqnr_db:.1f} dB")

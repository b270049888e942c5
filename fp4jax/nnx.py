"""Recipes for Flax NNX layers."""

from flax import nnx
from jaxtyping import Array

from fp4jax.dot import dot_general
from fp4jax.recipe import Recipe


class DotGeneral(nnx.Module):
  """`nnx.Linear(..., dot_general=DotGeneral(recipe, rngs))`: a recipe with its own random stream.

  Each call draws a new key from the stream `rounding` of `rngs`, state of the layer as dropout's
  is. Recipes that round to nearest need none: `dot_general=fp4jax.dot_general(recipe)`. In a layer
  that is there already, it is data: `layer.dot_general = nnx.data(DotGeneral(recipe, rngs))`.

  Raises:
    ValueError: `rngs` has no such stream. A draw from the default one would change the weights that
      are drawn after it, and two recipes would not start alike; those of `nnx.Rngs(0, rounding=1)`
      are those of `nnx.Rngs(0)`.
  """

  def __init__(self, recipe: Recipe, rngs: nnx.Rngs):
    if "rounding" not in rngs:
      raise ValueError(
        f'rngs has streams {list(rngs)}, not "rounding", such as nnx.Rngs(0, rounding=1)'
      )
    self.recipe = recipe
    self.stream = rngs.rounding.fork()

  def __call__(self, *args, **kwargs) -> Array:
    return dot_general(self.recipe, key=self.stream())(*args, **kwargs)

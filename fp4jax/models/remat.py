"""What a block computes again in the backward pass instead of keeping it."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax

from fp4jax.recipe import Residual

Remat = Literal["none", "attention+norm", "attention+norm+experts", "everything"]

# The choices of the router: experts computed for others would not be those whose rows are kept.
_ROUTING = ("router.logits", "experts.order")


def rematerialize(block: Callable, remat: Remat, packed: Residual, looped: bool = True) -> Callable:
  """`block` as `remat` says what is computed again; `packed` is how `moe_ffn` keeps x and h, and
  `looped` whether a scan runs the block.

  Every policy computes the same numbers, draws, taps and states included; in bfloat16 to the last
  bit if XLA may not leave out a rounding (`xla_allow_excess_precision`), which by default it does
  in one program and not in another. Beside the input of a block it keeps, of each token,

      none                    what each layer asks for
      attention+norm          what `moe_ffn` keeps, x once and h for each choice, as they are or as
                              the recipe packs them, and how the tokens were routed: the router's
                              float32 logits and the order of the rows. Of a dense or shared block
                              its input and the output of its first GEMM, in the activations' dtype
      attention+norm+experts  of these only what the recipe packs, and the routing
                              (both: with `weights_once` also the codes of the experts' weights)
      everything              nothing

  So none but the first keeps anything of attention; the first two run the GEMMs of the experts
  once, and so does the third with a recipe that packs both x and h. The last GEMM of a block is
  run once under all of them: no gradient asks for its result.
  """
  match remat:
    case "none":
      return block
    case "attention+norm":
      x = "feed_forward.x" if packed.lhs is None else "experts.x"
      names = (*_ROUTING, x, "experts.h", "experts.weights", "feed_forward.h")
    case "attention+norm+experts":
      formats = {"experts.x": packed.lhs, "experts.h": packed.hidden}
      kept = (name for name, fmt in formats.items() if fmt is not None)
      names = (*_ROUTING, "experts.weights", *kept)
    case "everything":
      names = ()
    case _:
      raise ValueError(f"{remat=} is not one of {get_args(Remat)}")
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  # XLA can't share the forward pass of a scan with the loop that goes back; any other it would.
  return functools.partial(jax.checkpoint, prevent_cse=not looped, policy=policy)(block)

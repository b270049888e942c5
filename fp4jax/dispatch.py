"""How the rows of tokens reach the devices of their experts, and how results come back.

    arrived = dispatch.send_rows(x, MXFP4, ...)    # to the devices of their experts
    out = dispatch.collect(part_of_each, ...)      # the sum over devices, at the token's own

`Whole` moves nothing: the device has every expert. `AllToAll` moves rows along a mesh axis that
divides the experts, inside `jax.shard_map`; a row goes once to each device that holds one or more
of its experts. It is the definition; `fp4jax.mosaic.dispatch.PeerMemory` does the same by kernels.

What arrives is larger than what is needed: a device keeps room for `capacity` rows of each device
on the axis. With room for all of them nothing can overflow.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PyTree, Shaped

from fp4jax.formats import Format
from fp4jax.implementation import Implementation
from fp4jax.operands import DrawIds, take_rows
from fp4jax.quantization import pack_rows
from fp4jax.quantized_array import QuantizedArray
from fp4jax.quantizers.quantizer import pad_to_blocks


class Choices(NamedTuple):
  """What the experts of a device are asked for: rows of tokens, k choices each."""

  experts: Int32[Array, "r k"]  # of this device; one more than there are: of another, or none
  parts: Int32[Array, " r"]  # which of the parts below a row is of
  places: Int32[Array, "r k"]  # of a choice within its part
  part_ids: Int32[Array, " p"]  # the numbers of the parts among all parts of all tokens


@runtime_checkable
class Dispatch(Protocol):
  def send(self, values: PyTree[Shaped[Array, "token ..."]]) -> PyTree[Shaped[Array, "r ..."]]:
    """What belongs to tokens, as it arrives at the experts."""

  def send_rows(
    self, x: Float[Array, "token d"], fmt: Format | None, implementation: Implementation
  ) -> Float[Array, "r d"] | QuantizedArray:
    """Rows of tokens as they arrive: packed in `fmt` where it is one, by `implementation`."""

  def collect(
    self, rows: Float32[Array, "r d"], sent: DTypeLike, dtype: DTypeLike, hidden: bool = False
  ) -> Float[Array, "token d"]:
    """For each token the sum in float32 of the rows that were sent for it, each sent back in the
    dtype `sent`, as `dtype`. `hidden`: GEMMs follow that do not wait for it."""

  def collect_choices(self, values: Float[Array, "r k"]) -> Float[Array, "token k"]:
    """For each choice the value from the device that had its expert; zero where none had."""

  def dropped(self) -> Int32[Array, ""]:
    """Choices of this device that were not sent, for want of room."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole:
  """Every expert is here."""

  def send(self, values):
    return values

  def send_rows(self, x, fmt, implementation):
    return packed(x, fmt, implementation)

  def collect(self, rows, sent, dtype, hidden=False):
    return rows.astype(dtype)

  def collect_choices(self, values):
    return values

  def dropped(self):
    return jnp.int32(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllToAll:
  """Experts are divided along a mesh axis, in order: its definition, on any device.

  Padded buffers: slot c of a peer holds the c-th token of those that go there.
  """

  token_of_slot: Int32[Array, "peer slot"]  # the number of tokens where a slot is empty
  slot_of_token: Int32[Array, "peer token"]  # the number of slots where a token does not go
  peer_of_choice: Int32[Array, "token k"]  # the number of peers for no expert
  axis: str = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(
    cls,
    choices: Choices,
    axis: str,
    experts_per_device: int,
    slots: int,
  ) -> tuple["AllToAll", Choices]:
    """From choices among all experts of the axis, with so many slots for each peer: and what
    arrives, whose parts are those of the first peer, then those of the second."""
    peers, (tokens, _) = lax.axis_size(axis), choices.experts.shape
    peer = jnp.minimum(choices.experts // experts_per_device, peers)
    goes = jnp.any(peer[None] == jnp.arange(peers)[:, None, None], axis=-1)  # (peer, token)
    slot = jnp.where(goes, jnp.cumsum(goes, axis=1) - 1, slots)
    slot = jnp.minimum(slot, slots).astype(jnp.int32)
    empty = jnp.full((peers, slots), tokens, jnp.int32)
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), slot.shape)
    token_of_slot = empty.at[jnp.arange(peers)[:, None], slot].set(token, mode="drop")

    first = jnp.arange(peers, dtype=jnp.int32)[:, None, None] * experts_per_device
    wanted = take_rows(choices.experts, token_of_slot) - first
    filled = (token_of_slot < tokens)[..., None]
    here = filled & (wanted >= 0) & (wanted < experts_per_device)
    wanted = jnp.where(here, wanted, experts_per_device)
    sent = (wanted, *(take_rows(x, token_of_slot) for x in (choices.parts, choices.places)))
    experts, parts, places = _exchange(sent, axis)
    part_ids = lax.all_gather(choices.part_ids, axis, tiled=True)
    source = jnp.repeat(jnp.arange(peers, dtype=jnp.int32), slots)
    arrived = Choices(experts, source * len(choices.part_ids) + parts, places, part_ids)
    return cls(token_of_slot, slot, peer, axis), arrived

  def send(self, values):
    return _exchange(jax.tree.map(lambda x: take_rows(x, self.token_of_slot), values), self.axis)

  def send_rows(self, x, fmt, implementation):
    return self.send(packed(x, fmt, implementation))

  def collect(self, rows, sent, dtype, hidden=False):
    (returned,) = self._returned(rows.astype(sent))
    own = jax.vmap(take_rows)(returned, self.slot_of_token)
    return jnp.sum(own.astype(jnp.float32), axis=0).astype(dtype)

  def collect_choices(self, values):
    (returned,) = self._returned(values)
    k = returned.shape[-1]
    slot = self._slot_of_choice()
    place = (self.peer_of_choice, slot, jnp.arange(k)[None])
    return returned.at[place].get(mode="fill", fill_value=0)

  def dropped(self):
    peers, slots = self.token_of_slot.shape
    return jnp.sum((self._slot_of_choice() == slots) & (self.peer_of_choice < peers))

  def _slot_of_choice(self):
    slots, tokens = self.token_of_slot.shape[1], jnp.arange(len(self.peer_of_choice))
    place = (self.peer_of_choice, tokens[:, None])
    return self.slot_of_token.at[place].get(mode="fill", fill_value=slots)

  def _returned(self, *rows):
    shape = self.token_of_slot.shape
    by_peer = [x.reshape(*shape, *x.shape[1:]) for x in rows]
    return [lax.all_to_all(x, self.axis, 0, 0) for x in by_peer]


def packed(
  x: Float[Array, "token d"], fmt: Format | None, implementation: Implementation
) -> Float[Array, "token d"] | QuantizedArray:
  return x if fmt is None else pack_rows(pad_to_blocks(x, fmt, -1), fmt, implementation)


def _exchange(rows, axis):
  """(peer, slot, ...) of each array to (peer * slot, ...): what the peers had for this device."""

  def exchange(x):
    return lax.all_to_all(x, axis, 0, 0).reshape(-1, *x.shape[2:])

  return jax.tree.map(exchange, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
  """Choice `row * k + j` is the j-th of a row that arrived; rows of the products are choices sorted
  by expert and then by part of the tokens, stably.

  The rows of each group are filled up to a multiple of `tile`, and so are the rows after the last
  group's to a fixed number. An empty row holds choice `rows * k`, one more than there are: it
  gathers zeros. But of `of_all_tokens` each expert's rows are all tokens, in their order.
  """

  choice_of_row: Int32[Array, " row"]
  row_of_choice: Int32[Array, " choice"]  # the number of rows for a choice that has none
  group_sizes: Int32[Array, " g"]  # in rows, the filling included; as many groups for each expert
  experts: int = dataclasses.field(metadata={"static": True})
  ids: DrawIds = DrawIds()  # noqa: RUF009
  # Of the products in XLA; None: what a backward pass needs.
  rows_per_tile: int | None = dataclasses.field(default=None, metadata={"static": True})
  of_all: bool = dataclasses.field(default=False, metadata={"static": True})  # rows for all tokens

  @classmethod
  def of(
    cls, choices: Choices, num_experts: int, tile: int = 1, rows: int | None = None
  ) -> "Order":
    """`rows`: how many choices there is room for, by default for all."""
    num_parts = len(choices.part_ids)
    groups = num_experts * num_parts
    group = (choices.experts * num_parts + choices.parts[:, None]).ravel()
    group = jnp.where(choices.experts.ravel() < num_experts, group, groups)
    place = jnp.argsort(jnp.argsort(group, stable=True))  # of each choice among the sorted
    sizes = jnp.bincount(group, length=groups)
    filled = -(-sizes // tile) * tile
    end = jnp.cumsum(filled)
    moved = (end - filled) - (jnp.cumsum(sizes) - sizes)
    rows = group.size if rows is None else rows
    rows = rows if tile == 1 else tile * (rows // tile + groups)
    row = jnp.where(group < groups, place + moved[jnp.minimum(group, groups - 1)], rows)
    row = jnp.minimum(row, rows).astype(jnp.int32)
    choice = jnp.full(rows, group.size, jnp.int32)
    choice = choice.at[row].set(jnp.arange(group.size, dtype=jnp.int32), mode="drop")
    filled = jnp.diff(jnp.minimum(end, rows), prepend=0)
    return cls(choice, row, filled.astype(jnp.int32), num_experts)

  @classmethod
  def of_all_tokens(cls, choices: Choices, num_experts: int) -> "Order":
    """Every expert has a row for every token, an empty one where the token did not choose it, and
    one for two choices of the same expert. The expert is a tile of so many rows."""
    tokens, k = choices.experts.shape
    expert, token = jnp.arange(num_experts, dtype=jnp.int32), jnp.arange(tokens, dtype=jnp.int32)
    chosen = choices.experts == expert[:, None, None]  # (expert, token, k)
    choice = token * k + jnp.argmax(chosen, axis=-1).astype(jnp.int32)
    choice = jnp.where(jnp.any(chosen, axis=-1), choice, tokens * k)
    rows = num_experts * tokens
    row = jnp.minimum(choices.experts * tokens + token[:, None], rows)
    sizes = jnp.full(num_experts, tokens, jnp.int32)
    return cls(choice.ravel(), row.ravel(), sizes, num_experts, rows_per_tile=tokens, of_all=True)

  def with_ids(self, choices: Choices, experts: Int32[Array, " e"]) -> "Order":
    """`experts`: the numbers of the experts here among all."""
    part, k = choices.part_ids[choices.parts], choices.places.shape[1]
    rows = jnp.stack([jnp.repeat(part, k), choices.places.ravel()], axis=-1)
    of_parts, of_experts = len(choices.part_ids), len(experts)
    groups = (jnp.tile(choices.part_ids, of_experts), jnp.repeat(experts, of_parts))
    ids = DrawIds(take_rows(rows, self.choice_of_row), experts[:, None], jnp.stack(groups, axis=-1))
    return dataclasses.replace(self, ids=ids)

  def dropped(self, choices: Choices) -> Int32[Array, ""]:
    """Choices of an expert here that have no row, for want of room."""
    of_expert = choices.experts.ravel() < self.experts
    return jnp.sum(of_expert & (self.row_of_choice == self.choice_of_row.size))

  @property
  def groups(self) -> int:
    return self.group_sizes.size

  @property
  def expert_sizes(self) -> Int32[Array, " e"]:
    return jnp.sum(self.group_sizes.reshape(self.experts, -1), axis=1)

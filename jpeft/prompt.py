"""Prompt tuning: rows that virtual token ids read, beside the table of embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft._lookup import lookup
from jpeft._states import check_shapes, put
from jpeft.kernels import fold
from jpeft.leaf import Call, Leaf, LeafError, Site, dense, register, static
from jpeft.paths import TargetError, flatten, match
from jpeft.prefix import PrefixTuning
from jpeft.transform import Nothing, Params, Trainable, Transform, chained
from jpeft.uses import Uses

Start = Literal["vocabulary", "uniform", "labels", "text"]


@register
@dataclasses.dataclass(frozen=True)
class PromptTable(Site):
    """A table of embeddings `(rows, width)` whose ids from `rows` on read the prompt.

    The model sees the table's own shape: where it is the output head too, there are logits of
    real tokens alone.

    **Attributes:** `base`, the table; `prompt`, `(length, width)`; `rows`, the axis of the table
    that counts rows.
    """

    base: Any
    prompt: Any
    rows: int = static(0)
    path: str = static("")

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        return dataclasses.replace(self, base=inner, prompt=PartitionSpec())

    def divided(self, parts: Sequence[int]) -> Leaf:
        """This leaf, whole: virtual ids follow the last row of the whole table."""
        if any(n > 1 for n in parts):
            raise LeafError(
                f"the prompt at '{self.path}' stands beside the whole table, but a shard_map "
                f"splits its shape {self.shape} into {tuple(parts)} parts: give every device the "
                "whole table"
            )
        return super().divided(parts)

    def switched(self, on: Array) -> PromptTable:
        """This leaf, with zeros for a prompt where `on` is false: such an example has no virtual
        ids (`virtual_tokens` gives it none).
        """
        return dataclasses.replace(self, prompt=jnp.where(on, self.prompt, 0))

    def rule_gather(self, call: Call, index: int) -> list[Any] | None:
        """A look-up of rows."""
        found = lookup(call, index, self.rows)
        if found is None:
            return None
        numbers, ids = found.numbers(call), call.operands[1]
        virtual = numbers >= self.shape[self.rows]
        real = jnp.where(virtual[..., None], 0, ids)
        call = dataclasses.replace(call, operands=(self.base, real, *call.operands[2:]))
        (y,) = call.dispatch(call)
        prompt = found.arrange(self._row(numbers).astype(y.dtype))
        return [jnp.where(found.arrange(virtual[..., None]), prompt, y)]

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """A look-up of one row."""
        sizes = call.params["slice_sizes"]
        width = 1 - self.rows
        if index != 0 or sizes[self.rows] != 1 or sizes[width] != self.shape[width]:
            return None
        number = call.operands[1 + self.rows]
        (y,) = call.rebind(0, self.base)
        row = jnp.expand_dims(self._row(number), self.rows).astype(y.dtype)
        return [jnp.where(number >= self.shape[self.rows], row, y)]

    def _row(self, numbers: Array) -> Array:
        """The prompt's rows behind virtual ids; any row behind others."""
        last = self.prompt.shape[0] - 1
        return self.prompt[jnp.clip(numbers - self.shape[self.rows], 0, last)]

    def rule_dot_general(self, call: Call, index: int) -> list[Any] | None:
        """The output head, over the width. A product over the rows would be a look-up by one-hot
        vectors, which have no place for virtual ids.
        """
        contract, _ = call.params["dimension_numbers"]
        return call.rebind(index, self.base) if self.rows not in contract[index] else None

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """Rows and width change places."""
        (base,) = call.rebind(index, self.base)
        rows = list(call.params["permutation"]).index(self.rows)
        return [dataclasses.replace(self, base=base, rows=rows)]


@dataclasses.dataclass(frozen=True)
class PromptTuning(Transform):
    """`length` virtual tokens in the input, whose embeddings alone are trained.

    Their ids follow the table's last row. `jpeft.virtual_tokens` puts them into a batch, with
    mask, positions and labels.

    **Arguments:**

    - `length`: of the prompt.
    - `targets`: a pattern of the table of word embeddings, and of nothing else.
    - `init_from`: `vocabulary`, the embeddings of tokens drawn from `vocabulary`, without
      replacement where it has as many; `uniform` in [-0.5, 0.5]; `labels`, the mean embedding of
      each entry of `tokens` (a class label's sub-tokens), then drawn tokens; `text`, the tokens of
      `tokens[0]`, over and over.
    - `vocabulary`: first and last + 1 of the rows to draw from; the paper's are the 5,000 most
      frequent. BERT's own words start at row 1996.
    - `tokens`: token ids for `labels` and `text`.

    Source: Lester et al. 2021, sections 2 and 3.2. It wants a large learning rate, without decay:
    Adafactor at 0.3 in the paper.
    """

    length: int = 100
    targets: str | Sequence[str] = r"word_embeddings/embedding$"
    init_from: Start = "vocabulary"
    vocabulary: tuple[int, int] = (0, 5000)
    tokens: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a prompt has at least 1 token, got {self.length}")
        if self.init_from not in ("vocabulary", "uniform", "labels", "text"):
            raise ValueError(
                f"init_from is vocabulary, uniform, labels or text, got '{self.init_from}'"
            )
        if self.init_from in ("labels", "text") and not (self.tokens and all(self.tokens)):
            raise ValueError(f"init_from='{self.init_from}' needs tokens=((id, ...), ...)")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: {"prompt": fp32 (length, width)}}` for the table."""
        del uses
        leaves = flatten(params)
        path = self._table(leaves)
        return {path: {"prompt": self._start(fold(key, path), dense(leaves[path]))}}

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `PromptTable` in place of the table."""
        del key
        return put(params, trainable, self._leaf)

    def clash(self, other: Transform) -> str | None:
        """Two prompts would have the same ids, and a prefix may cover a prompt."""
        if isinstance(other, PromptTuning):
            return "both would have the ids after the table's last row: make one longer prompt"
        if isinstance(other, PrefixTuning) and other.after < self.length:
            return (
                f"the prefix would cover the prompt's keys and values: give it after={self.length}"
            )
        return None

    def decoding(self) -> Transform:
        """For steps of generation that read a cache: the prompt is in it already."""
        return Nothing(self)

    def _leaf(self, path: str, table: Any, state: Any) -> PromptTable:
        if not isinstance(state, Mapping) or "prompt" not in state:
            raise TargetError(
                f"the trained state at '{path}' is no prompt: it is of another method"
            )
        check_shapes(path, state, {"prompt": (self.length, table.shape[1])})
        return PromptTable(table, state["prompt"], 0, path)

    def _table(self, leaves: dict[str, Any]) -> str:
        found = match(self.targets, leaves)
        if len(found) > 1:
            raise TargetError(f"the prompt's targets match {len(found)} tables: {', '.join(found)}")
        leaf = leaves[found[0]]
        if len(leaf.shape) != 2:
            raise TargetError(
                f"'{found[0]}' has shape {tuple(leaf.shape)}: a prompt needs the table of word "
                "embeddings, (rows, width)"
            )
        if isinstance(leaf, Site):
            raise TargetError(f"'{found[0]}' already has {type(leaf).__name__}")
        return found[0]

    def _start(self, key: PRNGKeyArray, table: Any) -> Float[Array, "n d"]:
        n = self.length
        if self.init_from == "uniform":
            return jax.random.uniform(key, (n, table.shape[1]), minval=-0.5, maxval=0.5)
        if any(not 0 <= i < table.shape[0] for ids in self.tokens for i in ids):
            raise TargetError(f"tokens has ids outside the table's {table.shape[0]} rows")
        if self.init_from == "text":
            ids = jnp.resize(jnp.asarray(self.tokens[0]), (n,))
            return jnp.asarray(table[ids], jnp.float32)
        first, last = self.vocabulary[0], min(self.vocabulary[1], table.shape[0])
        replacing = last - first < n
        if first < 0 or last <= first:
            raise TargetError(
                f"vocabulary={self.vocabulary} is empty in a table of {table.shape[0]} rows"
            )
        drawn = jax.random.choice(key, jnp.arange(first, last), (n,), replace=replacing)
        start = jnp.asarray(table[drawn], jnp.float32)
        labels = self.tokens[:n] if self.init_from == "labels" else ()
        means = [jnp.mean(table[jnp.asarray(ids)].astype(jnp.float32), axis=0) for ids in labels]
        return start.at[: len(means)].set(jnp.stack(means)) if means else start


def room(transform: Transform) -> int:
    """How many virtual tokens before the input a transform's prompts and prefixes take: the
    `length` of `virtual_tokens`, 0 where it has none.
    """
    inside = chained(transform)
    prompts = sum(t.length for t in inside if isinstance(t, PromptTuning))
    return max([prompts, *(t.after + t.length for t in inside if isinstance(t, PrefixTuning))])


def first_virtual_id(transform: Transform, rows: int) -> int:
    """The `first` of `virtual_tokens` for a transform, and a table of so many rows: a prompt's ids
    follow the table's, a prefix's are read by nobody and are 0.
    """
    return rows if any(isinstance(t, PromptTuning) for t in chained(transform)) else 0


def virtual_tokens(
    batch: dict[str, Int[Array, "b t"]],
    *,
    length: int,
    first: int = 0,
    after: int = 0,
    task: Int[Array, " b"] | None = None,
) -> dict[str, Int[Array, "b u"]]:
    """A batch with room for a prompt or a prefix: `length` virtual tokens more a row.

    **Arguments:**

    - `batch`, arrays `(b, t)` by Hugging Face's names: `input_ids` gets the virtual ids,
      `attention_mask` ones, `token_type_ids` zeros, `labels` -100 (no loss there), `position_ids`
      are made again from zero on, later ones moved up. What has another shape than `input_ids`
      stays.
    - `first`, the first virtual id: the table's number of rows for a prompt; 0 for a prefix, whose
      ids are all 0, since they are not read.
    - `after`, how many tokens stay before them; 1 for encoders whose first token is read.
    - `task`, each row's task: a row of no task (-1) gets its room at the end, masked, so that it
      runs as it would without. A batch without an `attention_mask` then gets one.

    **Raises:** `ValueError` for a key of that shape that it does not know.
    """
    ids = jnp.asarray(batch["input_ids"])
    rows, t = ids.shape
    new = jnp.broadcast_to(first + jnp.arange(length) * (first > 0), (rows, length))
    fill = {"input_ids": new, "attention_mask": 1, "token_type_ids": 0, "labels": -100}
    # Where every new position comes from in the row with its room appended.
    room = jnp.arange(t, t + length)
    order = jnp.concatenate([jnp.arange(after), room, jnp.arange(after, t)])
    order = jnp.broadcast_to(order, (rows, t + length))
    none = None if task is None else jnp.asarray(task)[:, None] < 0
    if none is not None:
        order = jnp.where(none, jnp.arange(t + length), order)
        batch = {"attention_mask": jnp.ones_like(ids), **batch}
        fill["attention_mask"] = jnp.where(none, 0, 1)
        fill["input_ids"] = jnp.where(none, 0, new)
    out: dict[str, Any] = {}
    for name, value in batch.items():
        if jnp.shape(value) != (rows, t):
            out[name] = value
            continue
        value = jnp.asarray(value)
        if name == "position_ids":
            low = value[:, :after]
            start = value[:, after - 1 : after] + 1 if after else value[:, :1]
            added = start + jnp.arange(length)
            moved = jnp.concatenate([low, added, value[:, after:] + length], axis=1)
            if none is not None:
                tail = value[:, -1:] + 1 + jnp.arange(length)
                moved = jnp.where(none, jnp.concatenate([value, tail], axis=1), moved)
            out[name] = moved
            continue
        if name not in fill:
            raise ValueError(
                f"virtual_tokens does not know what stands at virtual positions of '{name}': it "
                f"knows position_ids, {', '.join(fill)}"
            )
        added = jnp.broadcast_to(jnp.asarray(fill[name], value.dtype), (rows, length))
        longer = jnp.concatenate([value, added], axis=1)
        out[name] = jnp.take_along_axis(longer, order, axis=1)
    return out

"""Which keys each query of a flat, ragged batch sees."""

import dataclasses
import typing

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class MlaPrefillPlan:
    """A query sees the keys of its own sequence at its own or an earlier position.

    Attributes:
        query_seq: i32 [T], sequence of each query; negative for padding, which sees nothing.
        query_pos: i32 [T], position in the sequence.
        key_seq: i32 [S], sequence of each key; negative for keys nobody sees, which may hold NaN.
        key_pos: i32 [S].
        rows: the flat axes are `rows` equal parts and no sequence crosses a part; lets an
            implementation skip the rest.
        same_rows: queries and keys are the same tokens in the same order, each sequence's by rising
            position: what lies above the diagonal is never seen.
    """

    query_seq: jax.Array
    query_pos: jax.Array
    key_seq: jax.Array
    key_pos: jax.Array
    rows: int = dataclasses.field(default=1, metadata={"static": True})
    same_rows: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self) -> jax.Array:
        """bool [rows, T / rows, S / rows]."""
        q_seq, q_pos, k_seq, k_pos = (
            a.reshape(self.rows, -1)
            for a in (self.query_seq, self.query_pos, self.key_seq, self.key_pos)
        )
        same = (q_seq[:, :, None] == k_seq[:, None, :]) & (q_seq[:, :, None] >= 0)
        return same & (k_pos[:, None, :] <= q_pos[:, :, None])

    def used_keys(self) -> jax.Array:
        """bool [S]: keys that belong to a sequence."""
        return jnp.asarray(self.key_seq >= 0)

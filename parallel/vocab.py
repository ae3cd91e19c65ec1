"""The vocabulary split over devices: each has some rows of the table; rows of sums cross between them, never logits.

Both run inside `shard_map`, manual over `AXIS`.
"""

from collections.abc import Callable

import jax

AXIS = "tensor"


def look_up(table_VD, tokens_BT, dtype, *, ways: int):
    """`table[tokens]` `[B, T / ways, D]`: of the device's share of the tokens, whosever rows they are.

    Tokens outside of the table have zeros, as in every layout.

    Args:
      table_VD: this device's rows of the table.
      tokens_BT: int32, the same on all the devices.
      dtype: of the result; gradients are added up in the table's own.
      ways: how many devices split the table.
    """
    if ways > 1:
        tokens_BT = tokens_BT - jax.lax.axis_index(AXIS) * table_VD.shape[0]
    rows_BTD = table_VD.at[tokens_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
    if ways == 1:
        return rows_BTD
    # Of the addends at most one is not 0, so the sum is exact in any dtype.
    return jax.lax.psum_scatter(rows_BTD, AXIS, scatter_dimension=1, tiled=True)


def cross_entropy(loss: Callable, hidden_BTD, table_VD, labels_BT, weights_BT, *, ways: int, rows: tuple[str, ...]):
    """The loss over all rows, from this device's rows and its part of the vocabulary.

    Args:
      loss: `(hidden, table, labels, weights, vocab_axis=...) -> (loss_sum, weight)`.
      hidden_BTD, labels_BT, weights_BT: this device's rows.
      table_VD: its part of the output table.
      ways: how many devices split the vocabulary.
      rows: the mesh axes that split the rows.
    """
    split = {"vocab_axis": AXIS} if ways > 1 else {}
    loss_sum, weight = loss(hidden_BTD, table_VD, labels_BT, weights_BT, **split)
    return jax.lax.psum(loss_sum, rows), jax.lax.psum(weight, rows)

"""The vocabulary split over devices: each has some rows of the table; rows of sums cross between them, never logits.

Both run inside `shard_map`, manual over the axes that split it.
"""

from collections.abc import Callable

import jax

AXES = ("stage", "tensor")


def look_up(table_VD, tokens_BT, dtype, *, axes: tuple[str, ...]):
    """`table[tokens]` `[B, T / ways, D]`: of the device's share of the tokens along `tensor`, whosever rows they are.

    Tokens outside of the table have zeros, as in every layout.

    Args:
      table_VD: this device's rows of the table.
      tokens_BT: int32, the same on all the devices.
      dtype: of the result; gradients are added up in the table's own.
      axes: those of `AXES` that split the table.
    """
    if axes:
        tokens_BT = tokens_BT - jax.lax.axis_index(axes) * table_VD.shape[0]
    rows_BTD = table_VD.at[tokens_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
    # Of the addends at most one is not 0, so the sums are exact in any dtype.
    if "tensor" in axes:
        rows_BTD = jax.lax.psum_scatter(rows_BTD, "tensor", scatter_dimension=1, tiled=True)
    return jax.lax.psum(rows_BTD, "stage") if "stage" in axes else rows_BTD


def cross_entropy(
    loss: Callable, hidden_BTD, table_VD, labels_BT, weights_BT, *, axes: tuple[str, ...], rows: tuple[str, ...]
):
    """The loss over all rows, from this device's rows and its part of the vocabulary.

    Args:
      loss: `(hidden, table, labels, weights, vocab_axis=...) -> (loss_sum, weight)`.
      hidden_BTD, labels_BT, weights_BT: this device's rows.
      table_VD: its part of the output table.
      axes: those of `AXES` that split the vocabulary.
      rows: the mesh axes that split the rows.
    """
    split = {"vocab_axis": axes} if axes else {}
    loss_sum, weight = loss(hidden_BTD, table_VD, labels_BT, weights_BT, **split)
    return jax.lax.psum(loss_sum, rows), jax.lax.psum(weight, rows)

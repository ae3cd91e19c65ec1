"""How a model's arrays lie over devices; here for one device, `crescendo.parallel.Layout` is the same for a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

Names = tuple[str | None, ...]
SeveralNames = tuple[Names, ...]


class Layout(Protocol):
    """What a model asks of a mesh, in logical axis names; it calls these and knows nothing of the rest."""

    def constrain(self, array: jax.Array, names: Names) -> jax.Array:
        """The same array, laid out by the logical names of its axes; None is an axis that isn't split."""
        ...

    def weight(self, array: jax.Array, names: Names) -> jax.Array:
        """The same array, its gradient summed over the devices before anything else happens to it.

        Its axis `kv_heads` may grow by copies, where there are more devices along heads than key heads.
        """
        ...

    def whole(self, array: jax.Array, names: Names) -> jax.Array:
        """A weight for a matmul of its own derivative rule: gathered as it is, and copied as `weight` does."""
        ...

    def weight_gradient(self, gradient: jax.Array, names: Names) -> jax.Array:
        """The gradient of a weight out of that of `whole`: summed over the devices, and over copies."""
        ...

    def in_row_order(self, array: jax.Array, axis: int = 1) -> jax.Array:
        """An array made in the natural order of a row's tokens, in the order in which rows lie on the devices."""
        ...

    def on_parts(
        self, function: Callable, arrays: Sequence[jax.Array], inputs: SeveralNames, outputs: Names | SeveralNames
    ) -> Any:
        """`function(*arrays)`, on every device's own parts: kernels see plain arrays there.

        Args:
          function: what one part of the result takes is in the same part of the arrays.
          arrays: its arguments.
          inputs: the logical names of their axes; an axis that isn't split is None.
          outputs: those of the result, or of each if there are several.
        """
        ...

    def attend(
        self, attention: Callable, q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, *, causal: bool, blocks: Any
    ) -> jax.Array:
        """`attention(q, k, v, segment_ids)`, each device having its own rows and heads.

        Where devices share rows, `blocks.forward` and `blocks.backward` attend over parts of them
        (`crescendo.pallas_kernels.attention.blocks`).
        """
        ...

    def look_up(self, table_VD, tokens_BT, dtype) -> jax.Array:
        """`table[tokens]` in `dtype`; zeros for tokens outside of the table."""
        ...

    def cross_entropy(self, loss: Callable, hidden_BTD, table_VD, labels_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
        """The sums of `loss(hidden, table, labels, weights, vocab_axis=...)` over all rows."""
        ...

    def experts(
        self, function: Callable, tokens: Sequence[jax.Array], kernels: Sequence[jax.Array], names: SeveralNames
    ) -> jax.Array:
        """`function(*tokens, *kernels, exchange=...)`, each device having its own tokens and some of the experts.

        Args:
          function: gives `[B, T, D]`; what devices with parts of an expert's width give is summed.
          tokens: `[B, T, ...]` each, laid out as the residual stream is.
          kernels: the experts' matrices.
          names: the logical names of their axes.
        """
        ...


class Exchange(Protocol):
    """How rows come to the devices that have their experts, and back.

    Attributes:
      devices: over how many the experts are split.
      chunks: into how many the tokens are cut, of which one is sent beside the work on another.
    """

    devices: int
    chunks: int

    def __call__(
        self, of_experts: Callable, rows: Sequence[jax.Array], sizes: Sequence[jax.Array], most: int | None
    ) -> list[jax.Array]:
        """What `of_experts(rows, sizes of the device's own experts)` makes of each chunk.

        Args:
          of_experts: gives as many rows as it is given.
          rows: of each chunk `[M, D]`, expert by expert; those behind the last expert's come back as zeros.
          sizes: of each chunk, how many rows an expert has.
          most: of a chunk's rows an expert has so many at most; None: any number.
        """
        ...


class Here:
    """All experts are on the device."""

    devices = chunks = 1

    def __call__(
        self, of_experts: Callable, rows: Sequence[jax.Array], sizes: Sequence[jax.Array], most: int | None
    ) -> list[jax.Array]:
        """What `of_experts` makes of the rows."""
        del most
        return list(map(of_experts, rows, sizes))


HERE = Here()


class OneDevice:
    """Everything in one place."""

    def constrain(self, array: jax.Array, names: Names) -> jax.Array:
        """The array."""
        del names
        return array

    def weight(self, array: jax.Array, names: Names) -> jax.Array:
        """The array, whose gradient is written as its product makes it, before layers are stacked.

        Otherwise the compiler has the stack add up the parts of products that it splits, many times as slowly.
        """
        del names
        return jax.lax.optimization_barrier(array)

    def whole(self, array: jax.Array, names: Names) -> jax.Array:
        """The array."""
        del names
        return array

    def weight_gradient(self, gradient: jax.Array, names: Names) -> jax.Array:
        """The gradient."""
        del names
        return gradient

    def in_row_order(self, array: jax.Array, axis: int = 1) -> jax.Array:
        """The array."""
        del axis
        return array

    def on_parts(
        self, function: Callable, arrays: Sequence[jax.Array], inputs: SeveralNames, outputs: Names | SeveralNames
    ) -> Any:
        """`function(*arrays)`."""
        del inputs, outputs
        return function(*arrays)

    def attend(
        self, attention: Callable, q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, *, causal: bool, blocks: Any
    ) -> jax.Array:
        """`attention(q, k, v, segment_ids)`."""
        del causal, blocks
        return attention(q_BTHE, k_BTKE, v_BTKE, segment_ids_BT)

    def look_up(self, table_VD, tokens_BT, dtype) -> jax.Array:
        """`table[tokens]`: before the cast, so that the gradient adds up the uses of a token in float32."""
        rows = table_VD.at[tokens_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return rows.astype(dtype)

    def cross_entropy(self, loss: Callable, hidden_BTD, table_VD, labels_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
        """`loss(hidden, table, labels, weights)`."""
        return loss(hidden_BTD, table_VD, labels_BT, weights_BT)

    def experts(
        self, function: Callable, tokens: Sequence[jax.Array], kernels: Sequence[jax.Array], names: SeveralNames
    ) -> jax.Array:
        """`function(*tokens, *kernels)`, gradients of the kernels being written as the products make them."""
        return function(*tokens, *map(self.weight, kernels, names))


ONE_DEVICE = OneDevice()

"""What a user would write otherwise, for a compiler to fuse; and tokamax's kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _plain(x, w, labels):
    logits = jnp.dot(x, w.T, preferred_element_type=jnp.float32)
    return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])


def _tokamax(x, w, labels):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(x, labels, w.T, reduction="sum")


PEERS: dict[str, dict[str, Callable]] = {"linear_cross_entropy": {"jax": _plain, "tokamax": _tokamax}}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""

    def loss(x, w, labels):
        import torch

        return torch.nn.functional.cross_entropy((x @ w.T).float(), labels.long(), reduction="sum")

    return {"torch.compile": loss} if op_name == "linear_cross_entropy" else {}

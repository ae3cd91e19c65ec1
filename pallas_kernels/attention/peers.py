"""What a user would call otherwise; cuDNN through JAX is one of the implementations."""

from collections.abc import Callable


def _tokamax(q, k, v, *, causal=False, **options):
    import tokamax

    if options:
        raise NotImplementedError(f"tokamax isn't asked for {', '.join(options)}")
    return tokamax.dot_product_attention(q, k, v, is_causal=causal, implementation="mosaic")


def _pallas_triton(q, k, v, *, causal=False, segment_ids=None):
    """JAX's own kernel in Pallas' Triton dialect."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    if isinstance(segment_ids, tuple) or q.shape[1:3] != k.shape[1:3]:
        raise NotImplementedError("JAX's own kernel is asked for equal lengths and as many key heads as query heads")
    return mha(q, k, v, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=causal)


def _cudnn(q, k, v):
    """Also where the implementation `cudnn` refuses, since there would be no gradients."""
    import jax

    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _copied(q, prefix_k, prefix_v, k, v, *, causal=False):
    """Plain attention, every member with a copy of the prefix."""
    import jax.numpy as jnp

    from crescendo.pallas_kernels.attention.op import attention

    members, length = q.shape[0] // prefix_k.shape[0], prefix_k.shape[1]
    k, v = (jnp.concatenate([jnp.repeat(a, members, 0), b], 1) for a, b in ((prefix_k, k), (prefix_v, v)))
    if not causal:
        return attention(q, k, v)
    sides = (jnp.arange(q.shape[1]), jnp.maximum(jnp.arange(k.shape[1]) - length, -1))
    positions = tuple(jnp.broadcast_to(x.astype(jnp.int32), (q.shape[0], x.size)) for x in sides)
    return attention(q, k, v, causal=True, positions=positions)


PEERS: dict[str, dict[str, Callable]] = {
    "attention": {"tokamax": _tokamax, "pallas_triton": _pallas_triton, "cudnn_forward": _cudnn},
    "shared_prefix": {"copied": _copied},
}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""
    if op_name != "attention":
        return {}

    def attention(q, k, v, *, causal=False, segment_ids=None, **options):
        import torch

        if options:
            raise ValueError(f"torch's attention has no {', '.join(options)}")
        mask = None
        if segment_ids is not None:
            if isinstance(segment_ids, tuple):
                raise ValueError("torch's attention is given one set of segment ids")
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
            if causal:
                mask = mask & torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*heads_first, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True)
        return out.transpose(1, 2)

    return {"torch": attention}

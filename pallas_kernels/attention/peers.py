"""What a user would call otherwise; cuDNN through JAX is one of the implementations."""

from collections.abc import Callable


def _tokamax(q, k, v, *, causal=False, **options):
    import tokamax

    if options:
        raise NotImplementedError(f"tokamax isn't asked for {', '.join(options)}")
    return tokamax.dot_product_attention(q, k, v, is_causal=causal, implementation="mosaic")


PEERS: dict[str, dict[str, Callable]] = {"attention": {"tokamax": _tokamax}}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""
    del op_name

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

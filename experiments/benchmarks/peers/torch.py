"""Hugging Face's Llama under `torch.compile`, with PyTorch's fused AdamW."""

from collections.abc import Mapping

import numpy as np

from crescendo.experiments.benchmarks.peers import Prepared
from crescendo.experiments.runtime.errors import UserError
from crescendo.models import ModelConfig

PACKAGES = ("torch", "transformers")
INSTALL = "pip install 'crescendo[hf]'"
ATTENTION = "causal_sdpa"  # as transformers knows it; without a mask of that name it makes none


def prepare(model: ModelConfig, rows: Mapping[str, np.ndarray]) -> Prepared:
    """Float32 parameters, matmuls under autocast in the model's dtype, on one GPU.

    Attention is what PyTorch chooses for a causal one: under `torch.compile` some versions of transformers give it the
    mask as an array, which rules out the fastest.

    Args:
      model: the decoder's shape, decided for the platform; queries and keys are not normalised.
      rows: `tokens` and `labels`, int32 `[B, T]`, a document a row.

    Raises:
      UserError: the model is for a GPU and PyTorch sees none.
    """
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    of_gpu = model.dtype == "bfloat16"
    if of_gpu and not torch.cuda.is_available():
        raise UserError("--peer torch: PyTorch sees no GPU here, and JAX does: install PyTorch with CUDA")
    device = "cuda" if of_gpu else "cpu"
    AttentionInterface.register(ATTENTION, _causal_attention)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        max_position_embeddings=rows["tokens"].shape[1],
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_head,
        use_cache=False,
        attn_implementation=ATTENTION,
    )
    network = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)
    compiled = torch.compile(network)
    tokens, labels = (torch.from_numpy(rows[name].astype(np.int64)).to(device) for name in ("tokens", "labels"))

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=of_gpu):
            loss = compiled(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Prepared(
        torch.cuda.get_device_name() if of_gpu else "cpu",
        sum(parameter.numel() for parameter in network.parameters()),
        step,
        float,
        lambda: torch.cuda.max_memory_allocated() if of_gpu else None,
    )


def _causal_attention(module, query, key, value, attention_mask, *, scaling, **_):
    """As transformers calls it: `[B, heads, T, head size]`, to `[B, T, heads, head size]` and no weights."""
    from torch.nn.functional import scaled_dot_product_attention

    assert attention_mask is None
    grouped = key.shape[1] != query.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None

"""The `config.json` of Hugging Face's transformers, and the decoder that it describes: Llama, or Qwen3.

The two differ in that alone that Qwen3's queries and keys are normalised. What a file asks for and the decoder here
doesn't do is refused by name, and so is what isn't known.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import visible
from crescendo.models import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
KNOWN_ARCHITECTURES = {name for kind in ("Llama", "Qwen3") for name in (f"{kind}ForCausalLM", f"{kind}Model")}
# What a folder may ask for that the decoder here doesn't do, by the value that means nothing is asked for.
WRITTEN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}
PLAIN = WRITTEN | {
    "attention_dropout": 0.0,
    "auto_map": None,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "rope_interleaved": False,
    "rope_type": "default",
}

# Beyond any model that there is; what the file says is believed before its weights are seen.
_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Layers = Annotated[int, Field(ge=1, le=1 << 12)]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


def _check_tokens(value: Any) -> Any:
    """That it is a token's number, or a list of them."""
    for token in value if isinstance(value, list) else [value]:
        if type(token) is not int or token < 0:
            raise ValueError(f"{value!r:.99} is no token's number")
    return value


_Tokens = Annotated[Any, AfterValidator(_check_tokens)]


class HFConfig(schemas.Schema):
    """What is understood of a `config.json`, but for `PLAIN` and for what is null, which is as if it weren't there."""

    # What the decoder is made of.
    model_type: Literal["llama", "qwen3"]
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None  # as many as heads
    head_dim: _Size | None = None  # 128 in Qwen3, else width by heads
    rms_norm_eps: _Positive
    rope_theta: _Positive = 10_000.0
    tie_word_embeddings: bool = False
    # What says nothing of its function: where it comes from, how it is loaded, initialised and generated with. A width
    # of sliding windows is one, since they aren't used.
    name_or_path: str | None = Field(None, alias="_name_or_path")
    architectures: list[str] | None = None
    transformers_version: str | None = None
    transformers_js_config: dict[str, Any] | None = Field(None, alias="transformers.js_config")
    torch_dtype: str | None = None
    dtype: str | None = None
    bos_token_id: _Tokens = None
    eos_token_id: _Tokens = None
    pad_token_id: int | None = None
    unk_token_id: int | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    initializer_range: Annotated[float, Field(ge=0)] | None = None
    use_cache: bool | None = None
    pretraining_tp: Annotated[int, Field(ge=1)] | None = None
    sliding_window: _Count | None = None
    max_window_layers: _Count | None = None
    is_llama_config: bool | None = None
    unsloth_version: str | None = None
    attn_implementation: str | None = None
    attn_implementation_autoset: bool | None = Field(None, alias="_attn_implementation_autoset")
    return_dict: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    torchscript: bool | None = None


KNOWN = {field.alias or name for name, field in HFConfig.model_fields.items()} | PLAIN.keys()


def hf_config(config: ModelConfig, *, end_of_text: int, max_length: int) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
      config: the decoder.
      end_of_text: the token before and after each document.
      max_length: the longest row trained on.

    Raises:
      UserError: for a decoder that neither format can hold.

    >>> hf_config(ModelConfig(), end_of_text=256, max_length=128)["model_type"]
    'qwen3'
    """
    if config.logit_soft_cap is not None:
        raise UserError(
            f"model.logit_soft_cap = {config.logit_soft_cap}: neither Llama nor Qwen3 caps its logits; "
            "only a model trained with None can be exported"
        )
    if config.experts is not None:
        raise UserError(
            f"model.experts = {config.experts}: neither Llama nor Qwen3 has experts; only a model without any can be "
            "exported"
        )
    kind = "qwen3" if config.qk_norm else "llama"
    content = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_length,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }
    written = schemas.checked(content, HFConfig, "the model").model_dump(exclude_unset=True)
    return written | {"rope_scaling": None} | WRITTEN


def model_config(content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for another architecture, a feature that the decoder here lacks, a setting that it doesn't know, or a
        value that is none of its setting's; the message names it.

    >>> model_config(hf_config(ModelConfig(), end_of_text=256, max_length=128), "config.json") == ModelConfig(
    ...     head_width=32
    ... )
    True
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{origin}: model_type = {kind!r:.99} can't be imported; {' and '.join(ARCHITECTURES)} can")
    settings = _settings(content, origin)
    _check_used(settings, origin)
    read = schemas.checked({n: x for n, x in settings.items() if n not in PLAIN}, HFConfig, origin)
    if not set(read.architectures or ()) <= KNOWN_ARCHITECTURES:
        raise UserError(
            f"{origin}: architectures = {read.architectures!r:.99} can't be imported; {ARCHITECTURES[kind]} can"
        )
    # Qwen3's heads are 128 wide unless the file says otherwise.
    head_width = read.head_dim or (128 if kind == "qwen3" else None)
    try:
        return ModelConfig(
            vocab_size=read.vocab_size,
            width=read.hidden_size,
            layers=read.num_hidden_layers,
            heads=read.num_attention_heads,
            kv_heads=read.num_key_value_heads or read.num_attention_heads,
            mlp_width=read.intermediate_size,
            head_width=head_width or read.hidden_size // read.num_attention_heads,
            qk_norm=kind == "qwen3",
            tied_head=read.tie_word_embeddings,
            rope_theta=float(read.rope_theta),
            norm_epsilon=read.rms_norm_eps,
        )
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def _settings(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What a file asks for, without what is null; the rotary settings of all places where files have them, together."""
    settings = {name: value for name, value in content.items() if value is not None}
    layers = settings.get("layer_types")
    if isinstance(layers, list) and all(layer == "full_attention" for layer in layers):
        del settings["layer_types"]
    for place in ("rope_parameters", "rope_scaling"):
        rotary = settings.pop(place, {})
        if not isinstance(rotary, Mapping):
            raise UserError(f"{origin}: {place} = {rotary!r:.99} is no object")
        for name, value in rotary.items():
            name = "rope_type" if name == "type" else name
            if value is not None and settings.setdefault(name, value) != value:
                raise UserError(
                    f"{origin}: {name} is both {settings[name]!r:.99} and {value!r:.99}: leave the right one"
                )
    return settings


def _check_used(settings: Mapping[str, Any], origin: str) -> None:
    """That every setting is one that the decoder has, or one that changes nothing."""
    for name, value in settings.items():
        if name in PLAIN and (value != PLAIN[name] or isinstance(value, bool) != isinstance(PLAIN[name], bool)):
            raise UserError(f"{origin}: {name} = {value!r:.99} can't be imported; the decoder here has {PLAIN[name]!r}")
        if name not in KNOWN:
            raise UserError(
                f"{origin}: {visible(name):.99} = {value!r:.99} is not known to the decoder here: remove it from the "
                "file if the model is the same without it"
            )

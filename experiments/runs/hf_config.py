"""The `config.json` of Hugging Face's transformers, and the decoder that it describes: one of `FORMATS`.

Llama and Qwen3 differ in that alone that Qwen3's queries and keys are normalised, and so do Mixtral and Qwen3Moe, which
have experts. What a file asks for and the decoder here doesn't do is refused by name, and so is what isn't known.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.text import visible
from crescendo.models import ModelConfig

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

    plain: ClassVar[dict[str, Any]] = PLAIN

    # What the decoder is made of.
    model_type: str
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

    @classmethod
    def known(cls) -> set[str]:
        """The settings that a file may have."""
        return {field.alias or name for name, field in cls.model_fields.items()} | cls.plain.keys()

    def of_experts(self) -> dict[str, Any]:
        """The decoder's fields that are about experts."""
        return {}


class _Experts(HFConfig):
    """What files of models with experts have besides; of `num_experts` the other name is `num_local_experts`."""

    num_experts: _Size
    num_experts_per_tok: _Size
    # What only training asks.
    output_router_logits: bool | None = None
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None

    def of_experts(self) -> dict[str, Any]:
        """The decoder's fields that are about experts."""
        chosen = {"experts": self.num_experts, "experts_per_token": self.num_experts_per_tok}
        return chosen | {"expert_width": self.intermediate_size}


class MixtralConfig(_Experts):
    """What is understood of Mixtral's, whose windows are used wherever they have a width."""

    plain: ClassVar[dict[str, Any]] = PLAIN | {"sliding_window": None, "router_jitter_noise": 0.0}

    rope_theta: _Positive = 1_000_000.0

    @model_validator(mode="after")
    def _has_our_weights(self) -> Self:
        if self.num_experts_per_tok == 1:
            raise ValueError(
                "num_experts_per_tok = 1 can't be imported: Mixtral gives a token's only expert the weight 1, the "
                "decoder here its share"
            )
        return self


class Qwen3MoeConfig(_Experts):
    """What is understood of Qwen3Moe's, where some layers may have no experts."""

    plain: ClassVar[dict[str, Any]] = PLAIN | {"mlp_only_layers": []}

    moe_intermediate_size: _Size
    decoder_sparse_step: _Layers = 1
    norm_topk_prob: bool = False

    @model_validator(mode="after")
    def _has_our_weights(self) -> Self:
        if self.norm_topk_prob != (self.num_experts_per_tok > 1):
            raise ValueError(
                f"norm_topk_prob = {self.norm_topk_prob} can't be imported with num_experts_per_tok = "
                f"{self.num_experts_per_tok}: the decoder here divides the shares of several experts by their sum, and "
                "takes that of one as it is"
            )
        return self

    def of_experts(self) -> dict[str, Any]:
        """The decoder's fields that are about experts."""
        layers = {"moe_every": self.decoder_sparse_step, "expert_width": self.moe_intermediate_size}
        return super().of_experts() | layers


class Format(NamedTuple):
    """One of transformers' models.

    Attributes:
      name: as its classes have it.
      schema: of its `config.json`.
    """

    name: str
    schema: type[HFConfig]


FORMATS = {
    "llama": Format("Llama", HFConfig),
    "qwen3": Format("Qwen3", HFConfig),
    "mixtral": Format("Mixtral", MixtralConfig),
    "qwen3_moe": Format("Qwen3Moe", Qwen3MoeConfig),
}
"""By `model_type`."""


def format_of(config: ModelConfig) -> str:
    """The key of `FORMATS` that holds a decoder.

    Raises:
      UserError: for a decoder that none holds.

    >>> format_of(ModelConfig()), format_of(ModelConfig(experts=8, qk_norm=False))
    ('qwen3', 'mixtral')
    """
    kinds = ("llama", "qwen3") if config.experts is None else ("mixtral", "qwen3_moe")
    without, normalised = (FORMATS[kind].name for kind in kinds)
    for name in ("logit_soft_cap", "router", "balance", "shared_expert_width", "expert_capacity"):
        value, held = getattr(config, name), getattr(ModelConfig, name)
        if value != held:
            raise UserError(
                f"model.{name} = {value!r}: neither {without} nor {normalised} has that; only a model trained with "
                f"{held!r} can be exported"
            )
    if config.qk_norm or config.experts is None:
        return kinds[config.qk_norm]
    if config.moe_every > 1:
        raise UserError(
            f"model.moe_every = {config.moe_every} without model.qk_norm: {without} has experts in every layer, and "
            f"{normalised} normalises queries and keys; only a model trained with 1, or with qk_norm, can be exported"
        )
    if config.experts_per_token == 1:
        raise UserError(
            f"model.experts_per_token = 1 without model.qk_norm: {without} gives a token's only expert the weight 1, "
            f"not its share, and {normalised} normalises queries and keys; only a model trained with at least 2, or "
            "with qk_norm, can be exported"
        )
    return "mixtral"


def hf_config(config: ModelConfig, *, end_of_text: int, max_length: int) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
      config: the decoder.
      end_of_text: the token before and after each document.
      max_length: the longest row trained on.

    Raises:
      UserError: for a decoder that none of `FORMATS` holds.

    >>> hf_config(ModelConfig(), end_of_text=256, max_length=128)["model_type"]
    'qwen3'
    """
    kind = format_of(config)
    # A model whose layers all have experts knows no other feed-forward part.
    inner = config.expert_size if kind == "mixtral" else config.mlp_width
    content = {
        "architectures": [f"{FORMATS[kind].name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": inner,
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
    if kind == "mixtral":
        content |= {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    elif kind == "qwen3_moe":
        content |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.experts_per_token > 1,
            "moe_intermediate_size": config.expert_size,
            "decoder_sparse_step": config.moe_every,
            "mlp_only_layers": [],
        }
    content |= {"rope_scaling": None} | WRITTEN
    _checked(content, "the model")
    return content


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
    read = _checked(content, origin)
    kind = read.model_type
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
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            tied_head=read.tie_word_embeddings,
            rope_theta=float(read.rope_theta),
            norm_epsilon=read.rms_norm_eps,
            **read.of_experts(),
        )
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def _checked(content: Mapping[str, Any], origin: str) -> HFConfig:
    """A file's settings, each of them one that the decoder has, or one that changes nothing."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UserError(f"{origin}: model_type = {kind!r:.99} can't be imported; {', '.join(FORMATS)} can")
    settings, schema = _settings(content, origin), FORMATS[kind].schema
    _check_used(settings, schema, origin)
    read = schemas.checked({n: x for n, x in settings.items() if n not in schema.plain}, schema, origin)
    known = {f"{of.name}{what}" for of in FORMATS.values() for what in ("ForCausalLM", "Model")}
    if not set(read.architectures or ()) <= known:
        raise UserError(
            f"{origin}: architectures = {read.architectures!r:.99} can't be imported; {FORMATS[kind].name}ForCausalLM "
            "can"
        )
    return read


def _settings(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What a file asks for, without what is null; what files have in several places, or by two names, together."""
    settings: dict[str, Any] = {}
    for name, value in content.items():
        if value is not None:
            _add(settings, "num_experts" if name == "num_local_experts" else name, value, origin)
    layers = settings.get("layer_types")
    if isinstance(layers, list) and all(layer == "full_attention" for layer in layers):
        del settings["layer_types"]
    for place in ("rope_parameters", "rope_scaling"):
        rotary = settings.pop(place, {})
        if not isinstance(rotary, Mapping):
            raise UserError(f"{origin}: {place} = {rotary!r:.99} is no object")
        for name, value in rotary.items():
            if value is not None:
                _add(settings, "rope_type" if name == "type" else name, value, origin)
    return settings


def _add(settings: dict[str, Any], name: str, value: Any, origin: str) -> None:
    if (there := settings.setdefault(name, value)) is not value and there != value:
        raise UserError(f"{origin}: {name} is both {there!r:.99} and {value!r:.99}: leave the right one")


def _check_used(settings: Mapping[str, Any], schema: type[HFConfig], origin: str) -> None:
    """That every setting is one that the decoder has, or one that changes nothing."""
    plain, known = schema.plain, schema.known()
    for name, value in settings.items():
        if name in plain and (value != plain[name] or isinstance(value, bool) != isinstance(plain[name], bool)):
            raise UserError(f"{origin}: {name} = {value!r:.99} can't be imported; the decoder here has {plain[name]!r}")
        if name not in known:
            raise UserError(
                f"{origin}: {visible(name):.99} = {value!r:.99} is not known to the decoder here: remove it from the "
                "file if the model is the same without it"
            )

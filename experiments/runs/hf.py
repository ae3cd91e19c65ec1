"""Decoders in the format of Hugging Face's transformers: Llama, or Qwen3 where queries and keys are normalised.

The two differ from each other in that alone, and from `crescendo.models` in names and in the layout of matrices: theirs
are outputs x inputs, one tensor a layer, with a head's rows together.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import typeguard

from crescendo.experiments.runtime.encoding import read_text
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.models import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a folder may ask for that the decoder here doesn't do, by the value that means nothing is asked for.
WRITTEN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}
PLAIN = WRITTEN | {
    "attention_dropout": 0.0,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "rope_interleaved": False,
    "rope_type": "default",
}
# What the decoder is made of.
READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
}
# What says nothing of its function: where it comes from, how it is loaded, initialised and generated with. A width of
# sliding windows is one, since they aren't used.
NO_FUNCTION = {
    *("_name_or_path", "architectures", "transformers_version", "transformers.js_config", "torch_dtype", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "max_position_embeddings", "initializer_range"),
    *("use_cache", "pretraining_tp", "sliding_window", "max_window_layers", "is_llama_config", "unsloth_version"),
    *("attn_implementation", "_attn_implementation_autoset", "return_dict", "output_attentions"),
    *("output_hidden_states", "torchscript", "auto_map"),
}
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
INDEX = "model.safetensors.index.json"


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
    kind = "qwen3" if config.qk_norm else "llama"
    return {
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
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_length,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
        **WRITTEN,
    }


def model_config(content: Mapping[str, Any], origin: str) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Raises:
      UserError: for another architecture, a feature that the decoder here lacks, or a setting that it doesn't know;
        the message names it.

    >>> model_config(hf_config(ModelConfig(), end_of_text=256, max_length=128), "config.json") == ModelConfig(
    ...     head_width=32
    ... )
    True
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(f"{origin}: model_type = {kind!r} can't be imported; {' and '.join(ARCHITECTURES)} can")
    content = _settings(content, origin)
    _check_used(content, origin)
    heads: Any = content.get("num_attention_heads")
    # Qwen3's heads are 128 wide unless the file says otherwise.
    head_width = content.get("head_dim") or (128 if kind == "qwen3" else None)
    try:
        config = ModelConfig(
            vocab_size=content["vocab_size"],
            width=content["hidden_size"],
            layers=content["num_hidden_layers"],
            heads=content["num_attention_heads"],
            kv_heads=content.get("num_key_value_heads", heads),
            mlp_width=content["intermediate_size"],
            head_width=head_width or content["hidden_size"] // heads,
            qk_norm=kind == "qwen3",
            tied_head=content.get("tie_word_embeddings", False),
            rope_theta=float(content.get("rope_theta", 10_000.0)),
            norm_epsilon=content["rms_norm_eps"],
        )
        for field in dataclasses.fields(config):
            typeguard.check_type(getattr(config, field.name), field.type)
    except KeyError as missing:
        raise UserError(f"{origin} has no {missing}: is it the config.json of a {kind} model?") from None
    except typeguard.TypeCheckError as error:
        raise UserError(f"{origin}: {field.name} = {getattr(config, field.name)!r:.99}: {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def _settings(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What a file asks for, without what is null; the rotary settings of all places where files have them, together."""
    settings = {name: value for name, value in content.items() if value is not None}
    layers = settings.get("layer_types")
    if isinstance(layers, list) and all(layer == "full_attention" for layer in layers):
        del settings["layer_types"]
    for place in ("rope_parameters", "rope_scaling"):
        rotary = settings.pop(place, {})
        if not isinstance(rotary, Mapping):
            raise UserError(f"{origin}: {place} = {rotary!r} is no object")
        for name, value in rotary.items():
            name = "rope_type" if name == "type" else name
            if value is not None and settings.setdefault(name, value) != value:
                raise UserError(f"{origin}: {name} is both {settings[name]!r} and {value!r}: leave the right one")
    return settings


def _check_used(settings: Mapping[str, Any], origin: str) -> None:
    """That every setting is one that the decoder has, or one that changes nothing."""
    for name, value in settings.items():
        if name in PLAIN and value != PLAIN[name]:
            raise UserError(f"{origin}: {name} = {value!r:.99} can't be imported; the decoder here has {PLAIN[name]!r}")
        if name not in PLAIN.keys() | READ | NO_FUNCTION:
            raise UserError(
                f"{origin}: {name} = {value!r:.99} is not known to the decoder here: remove it from the file if the "
                "model is the same without it"
            )


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A tensor of one layer: our name and shape `inputs + outputs`, theirs `[outputs, inputs]`."""

    ours: tuple[str, ...]
    theirs: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()  # none: a vector, the same in both


def _layer(config: ModelConfig) -> Iterator[_Matrix]:
    width, inner = (config.width,), (config.mlp_width,)
    queries, keys = (config.heads, config.head_size), (config.kv_heads, config.head_size)
    yield _Matrix(("attention_norm", "scale"), "input_layernorm", width)
    yield _Matrix(("attention", "query", "kernel"), "self_attn.q_proj", width, queries)
    yield _Matrix(("attention", "key", "kernel"), "self_attn.k_proj", width, keys)
    yield _Matrix(("attention", "value", "kernel"), "self_attn.v_proj", width, keys)
    yield _Matrix(("attention", "output", "kernel"), "self_attn.o_proj", queries, width)
    if config.qk_norm:
        yield _Matrix(("attention", "query_norm", "scale"), "self_attn.q_norm", (config.head_size,))
        yield _Matrix(("attention", "key_norm", "scale"), "self_attn.k_norm", (config.head_size,))
    yield _Matrix(("mlp_norm", "scale"), "post_attention_layernorm", width)
    yield _Matrix(("mlp", "gate", "kernel"), "mlp.gate_proj", width, inner)
    yield _Matrix(("mlp", "up", "kernel"), "mlp.up_proj", width, inner)
    yield _Matrix(("mlp", "down", "kernel"), "mlp.down_proj", inner, width)


def _rest(config: ModelConfig) -> dict[tuple[str, ...], str]:
    """What isn't a layer's, the same in both."""
    names: dict[tuple[str, ...], str] = {
        ("embedding", "table"): "model.embed_tokens.weight",
        ("final_norm", "scale"): "model.norm.weight",
    }
    return names if config.tied_head else names | {("head", "table"): "lm_head.weight"}


def _get(tree: Mapping, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: dict, path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def hf_tensors(config: ModelConfig, parameters: Mapping) -> dict[str, np.ndarray]:
    """The tensors of `model.safetensors`, float32, from a model's parameters."""
    tensors = {name: np.asarray(_get(parameters, path)) for path, name in _rest(config).items()}
    for matrix in _layer(config):
        stacked = np.asarray(_get(parameters["blocks"], matrix.ours))
        for layer, array in enumerate(stacked):
            if matrix.outputs:
                array = array.reshape(int(np.prod(matrix.inputs)), -1).T
            tensors[f"model.layers.{layer}.{matrix.theirs}.weight"] = np.ascontiguousarray(array)
    return tensors


def model_parameters(config: ModelConfig, tensors: Mapping[str, np.ndarray], origin: str) -> dict:
    """A model's parameters, float32 in nested dicts, from the tensors of a folder.

    Raises:
      UserError: for a tensor that is missing, of another shape than the configuration makes it, or not used. Of a model
        that reads and writes with one table that table may be there twice.
    """
    unused = dict(tensors)

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{origin} has no tensor {name}")
        if tensors[name].shape != shape:
            raise UserError(f"{origin}: {name} has the shape {tensors[name].shape}, its config.json says {shape}")
        return np.asarray(unused.pop(name), np.float32)

    parameters: dict = {}
    for path, name in _rest(config).items():
        size = (config.width,) if path[-1] == "scale" else (config.vocab_size, config.width)
        _set(parameters, path, tensor(name, size))
    blocks: dict = {}
    for matrix in _layer(config):
        inputs, outputs = int(np.prod(matrix.inputs)), int(np.prod(matrix.outputs))
        shape = (outputs, inputs) if matrix.outputs else matrix.inputs
        layers = [tensor(f"model.layers.{i}.{matrix.theirs}.weight", shape) for i in range(config.layers)]
        stacked = [x.T.reshape(matrix.inputs + matrix.outputs) if matrix.outputs else x for x in layers]
        _set(blocks, matrix.ours, np.stack(stacked))
    for name, array in unused.items():
        if name == "lm_head.weight" and config.tied_head:
            if not np.array_equal(array, tensors["model.embed_tokens.weight"]):
                raise UserError(
                    f"{origin}: its config.json says tie_word_embeddings, but lm_head.weight is not "
                    "model.embed_tokens.weight: set that to false, or remove the tensor that is not the model's"
                )
        elif not _is_rotary(config, name, array):
            raise UserError(f"{origin} has a tensor {name} of {array.shape}, which the decoder here has no use for")
    return parameters | {"blocks": blocks}


def _is_rotary(config: ModelConfig, name: str, array: np.ndarray) -> bool:
    """Whether a tensor holds the decoder's own rotary frequencies, which older folders have."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_size, 2) / config.head_size)
    ours = array.shape == frequencies.shape and np.allclose(array, frequencies, rtol=1e-2)  # they may be in 16 bits
    return name.endswith("rotary_emb.inv_freq") and ours


def write_folder(folder: Path, config: ModelConfig, parameters: Mapping, tokenizer, *, max_length: int) -> None:
    """Writes `config.json`, `generation_config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.

    Raises:
      UserError: for a decoder that the format can't hold, or a disk that is full or can't be written.
    """
    from safetensors.numpy import save_file

    content = hf_config(config, end_of_text=tokenizer.end_of_text, max_length=max_length)
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    end = tokenizer.spelling(tokenizer.end_of_text)
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    files = {"config.json": content, "generation_config.json": ends, "tokenizer_config.json": of_tokenizer}
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        save_file(hf_tensors(config, parameters), folder / "model.safetensors", metadata={"format": "pt"})
        # Which was made as a temporary file, for its owner alone.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _files_of_index(folder: Path) -> set[str]:
    """The files that hold the weights, where these are several and a list of them is there."""
    if not (folder / INDEX).is_file():
        return set()
    try:
        return set(_read_object(folder / INDEX)["weight_map"].values())
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"{folder / INDEX} has no weight_map of tensors' names to files' names") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object: is it that of a model?")
    return content


def read_config(folder: Path) -> ModelConfig:
    """The decoder of a folder.

    Raises:
      UserError: if it is no such folder, or holds what can't be imported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: name a folder in Hugging Face's format")
    return model_config(_read_object(path), str(path))


def read_parameters(folder: Path, config: ModelConfig) -> dict:
    """The parameters of a folder, of one safetensors file or several.

    Raises:
      UserError: if there are none, one of several is missing, they are no floating-point numbers, or they don't fit the
        configuration.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file: other formats of weights can't be imported")
    if missing := sorted(_files_of_index(folder) - {path.name for path in files}):
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}, which its {INDEX} names: copy all of its files there"
        )
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        try:
            with file_access("read", path), safe_open(path, framework="flax") as file:
                for name in file.keys():  # noqa: SIM118
                    if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                        raise UserError(
                            f"{path}: {name} is in {kind}: quantized weights can't be imported; save them in one of "
                            f"{', '.join(FLOATS)}"
                        )
                    if name in tensors:
                        raise UserError(f"{path}: {name} is in another file too: leave one of them in {folder}")
                    # JAX's array: NumPy has no bfloat16 of its own.
                    tensors[name] = np.asarray(file.get_tensor(name), np.float32)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from None
    return model_parameters(config, tensors, str(folder))

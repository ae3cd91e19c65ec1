"""Decoders in the format of Hugging Face's transformers: Llama or Qwen3, with experts Mixtral or Qwen3Moe.

They differ from `crescendo.models` in names and in the layout of matrices: theirs are outputs x inputs, one tensor a
layer, with a head's rows together.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from crescendo.experiments.runs.hf_config import format_of, hf_config, model_config
from crescendo.experiments.runtime import schemas
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.experiments.runtime.text import visible
from crescendo.models import ModelConfig

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
MOST_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"


class _Index(schemas.Schema):
    """Which file of the folder holds which tensor, where weights are in several."""

    metadata: dict[str, Any] | None = None
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A tensor of a layer, or of each of its experts: ours is of `inputs + outputs`, theirs of `[outputs, inputs]`."""

    ours: tuple[str, ...]
    theirs: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()  # none: a vector, the same in both
    experts: int | None = None  # each has a number in `theirs`

    def names(self, layers: Iterable[int]) -> Iterator[str]:
        """Their names, in our order."""
        for layer in layers:
            for expert in range(self.experts or 1):
                yield f"model.layers.{layer}.{self.theirs.format(expert)}.weight"


def _layer(config: ModelConfig, sparse: bool) -> Iterator[_Matrix]:
    width = (config.width,)
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
    yield from _of_experts(config) if sparse else _feed_forward(config)


def _feed_forward(config: ModelConfig) -> Iterator[_Matrix]:
    width, inner = (config.width,), (config.mlp_width,)
    yield _Matrix(("mlp", "gate", "kernel"), "mlp.gate_proj", width, inner)
    yield _Matrix(("mlp", "up", "kernel"), "mlp.up_proj", width, inner)
    yield _Matrix(("mlp", "down", "kernel"), "mlp.down_proj", inner, width)


def _of_experts(config: ModelConfig) -> Iterator[_Matrix]:
    assert config.experts is not None
    width, inner, experts = (config.width,), (config.expert_size,), config.experts
    mixtral = format_of(config) == "mixtral"
    place, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2") if mixtral else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    yield _Matrix(("mlp", "router", "kernel"), f"{place}.gate", width, (experts,))
    yield _Matrix(("mlp", "gate"), f"{place}.experts.{{}}.{gate}", width, inner, experts)
    yield _Matrix(("mlp", "up"), f"{place}.experts.{{}}.{up}", width, inner, experts)
    yield _Matrix(("mlp", "down"), f"{place}.experts.{{}}.{down}", inner, width, experts)


def _stacks(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], _Matrix, range]]:
    """Where our parameters have the matrices of several layers, and the numbers of these."""
    every = config.moe_every
    for first in range(every):
        place = ("blocks",) if every == 1 else ("blocks", f"layer_{first}")
        for matrix in _layer(config, sparse=config.experts is not None and first == every - 1):
            where = ("shared_block",) if config.shared_layers and matrix.outputs else place
            yield (*where, *matrix.ours), matrix, range(first, config.layers, every)


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
    """The tensors of `model.safetensors`, float32, from a model's parameters; what layers share once for each."""
    tensors = {name: np.asarray(_get(parameters, path)) for path, name in _rest(config).items()}
    for path, matrix, layers in _stacks(config):
        arrays = np.asarray(_get(parameters, path)).reshape(-1, *matrix.inputs, *matrix.outputs)
        repeated = len(layers) if path[0] == "shared_block" else 1
        for name, array in zip(matrix.names(layers), itertools.chain(*[arrays] * repeated), strict=True):
            if matrix.outputs:
                array = array.reshape(int(np.prod(matrix.inputs)), -1).T
            tensors[name] = np.ascontiguousarray(array)
    return tensors


def model_parameters(config: ModelConfig, tensors: dict[str, np.ndarray], origin: str) -> dict:
    """A model's parameters, float32 in nested dicts, from the tensors of a folder.

    Args:
      config: the model's.
      tensors: by name; taken out as they are used, so that the model isn't in memory twice.
      origin: the folder, for messages.

    Raises:
      UserError: for a tensor that is missing, of another shape than the configuration makes it, or not used. Of a model
        that reads and writes with one table that table may be there twice.
    """

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{origin} has no tensor {name}")
        if tensors[name].shape != shape:
            raise UserError(f"{origin}: {name} has the shape {tensors[name].shape}, its config.json says {shape}")
        return np.asarray(tensors.pop(name), np.float32)

    parameters: dict = {}
    for path, name in _rest(config).items():
        size = (config.width,) if path[-1] == "scale" else (config.vocab_size, config.width)
        _set(parameters, path, tensor(name, size))
    for path, matrix, layers in _stacks(config):
        inputs, outputs = int(np.prod(matrix.inputs)), int(np.prod(matrix.outputs))
        shape = (outputs, inputs) if matrix.outputs else matrix.inputs
        stacked = np.stack([tensor(name, shape).T for name in matrix.names(layers)])
        leading = (len(layers),) if matrix.experts is None else (len(layers), matrix.experts)
        _set(parameters, path, stacked.reshape(*leading, *matrix.inputs, *matrix.outputs))
    for name, array in tensors.items():
        if name == "lm_head.weight" and config.tied_head:
            if not np.array_equal(array, parameters["embedding"]["table"]):
                raise UserError(
                    f"{origin}: its config.json says tie_word_embeddings, but lm_head.weight is not "
                    "model.embed_tokens.weight: set that to false, or remove the tensor that is not the model's"
                )
        elif not _is_rotary(config, name, array):
            raise UserError(f"{origin} has a tensor {name} of {array.shape}, which the decoder here has no use for")
    return parameters


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
    # Without config.json the folder is no model: it goes first and comes last, so that what is cut short is told.
    files = {"generation_config.json": ends, "tokenizer_config.json": of_tokenizer, "config.json": content}
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        save_file(hf_tensors(config, parameters), folder / "model.safetensors", metadata={"format": "pt"})
        # Which was made as a temporary file, for its owner alone.
        shutil.copymode(folder / "tokenizer.json", folder / "model.safetensors")
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> ModelConfig:
    """The decoder of a folder.

    Raises:
      UserError: if it is no such folder, or holds what can't be imported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: name a folder in Hugging Face's format")
    return model_config(schemas.read(path, dict[str, Any]), str(path))


def read_parameters(folder: Path, config: ModelConfig) -> dict:
    """The parameters of a folder, of one safetensors file or several.

    Raises:
      UserError: if there are none, one of several is missing, they are no finite floating-point numbers, or they don't
        fit the configuration or the index.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file: other formats of weights can't be imported")
    index = _read_index(folder)
    if missing := sorted(set((index or {}).values()) - {path.name for path in files}):
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}, which its {INDEX} names: copy all of its files there"
        )
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        for name, array in _read_tensors(path):
            if name in tensors:
                raise UserError(f"{path}: {name} is in another file too: leave one of them in {folder}")
            if index is not None and index.get(name) != path.name:
                raise UserError(f"{path}: {name} isn't where {INDEX} says: restore both")
            tensors[name] = array
    if lacking := sorted((index or {}).keys() - tensors.keys()):
        raise UserError(f"{folder} has no tensor {lacking[0]}, which its {INDEX} names: restore its files")
    return model_parameters(config, tensors, str(folder))


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor; None where the folder has no list of them."""
    path = folder / INDEX
    return schemas.read(path, _Index).weight_map if path.exists() else None


def _check_header(path: Path) -> None:
    """That the header of a file of safetensors, behind its length in 8 bytes, names no tensor twice."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size <= MOST_HEADER_BYTES:  # beyond that safetensors refuses it
            schemas.parse(file.read(min(size, path.stat().st_size)), dict[str, Any], f"{path}: its header")


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are; a sum shows it three times as fast, where it doesn't overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def _read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, float32.

    Raises:
      UserError: for a file that is none or is damaged, and for numbers that aren't floating-point or finite.
    """
    from safetensors import SafetensorError, safe_open

    with file_access("read", path):
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read to its end: give a regular file")
        _check_header(path)
        try:
            with safe_open(path, framework="flax") as file:
                for name in file.keys():  # noqa: SIM118
                    where = f"{path}: {visible(name)}"
                    if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                        raise UserError(
                            f"{where} is in {kind}: quantized weights can't be imported; save them in one of "
                            f"{', '.join(FLOATS)}"
                        )
                    # JAX's array: NumPy has no bfloat16 of its own.
                    array = np.asarray(file.get_tensor(name), np.float32)
                    if not _is_finite(array):
                        raise UserError(f"{where} holds numbers that aren't finite: restore the file")
                    yield name, array
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from None

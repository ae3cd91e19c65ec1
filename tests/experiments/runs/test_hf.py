"""Export to and import from Hugging Face's format, and generating from what was trained."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo import models
from crescendo.experiments import export as export_command
from crescendo.experiments import generate as generate_command
from crescendo.experiments import import_hf
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs import references
from crescendo.experiments.data.tokenizer import ByteTokenizer
from crescendo.experiments.evaluate import evaluate
from crescendo.experiments.export import export
from crescendo.experiments.runs import hf, trained
from crescendo.experiments.runs.generation import generate, stream
from crescendo.experiments.runs.run import read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.starting import fresh_state, stored_shapes
from crescendo.experiments.trainer.training import train
from crescendo.models import ModelConfig
from crescendo.models.decode import decode, empty_cache, sample

SHAPES = [
    ModelConfig(layers=2, width=32, mlp_width=48),
    ModelConfig(layers=2, width=32, mlp_width=48, qk_norm=False, tied_head=False, head_width=12, rope_theta=5e5),
    ModelConfig(layers=2, width=32, mlp_width=24, qk_norm=False, tied_head=False, experts=4, expert_width=24),
    ModelConfig(layers=4, width=32, mlp_width=48, experts=4, expert_width=24, moe_every=2),
    ModelConfig(layers=2, width=32, mlp_width=48, experts=3, expert_width=24, experts_per_token=1),
]
KINDS = ["qwen3", "llama", "mixtral", "qwen3_moe", "qwen3_moe of one expert a token"]
MIXTRAL, QWEN3_MOE = SHAPES[2:4]


@pytest.fixture(scope="module")
def run(train_small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    return folder, train_small(folder)["loss"]


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def random_parameters(config):
    """No two alike, norm scales neither: exchanged ones would show."""
    parameters = models.initialize(config.for_platform("cpu"), jax.random.key(1))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(w * random.uniform(0.5, 1.5, w.shape), jnp.float32), parameters)


def drawn(config):
    """Parameters for what computes nothing: nothing is compiled."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.initialize(config.for_platform("cpu"), jax.random.key(0)))
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def uncached(model, tokens):
    """Logits by the model's own forward pass, in one document."""
    forward = models.apply(model.config, model.parameters)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return forward(tokens, jnp.ones_like(tokens), positions) @ forward.output_table().T


@pytest.mark.parametrize("config", SHAPES, ids=KINDS)
def test_a_model_comes_back_from_the_format_as_it_was(config):
    parameters = drawn(config)
    content = hf.hf_config(config, end_of_text=256, max_length=64)
    read = hf.model_config(json.loads(json.dumps(content)), "config.json")
    assert dataclasses.replace(read, head_width=config.head_width) == config
    tensors = hf.hf_tensors(config, parameters)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (config.kv_heads * config.head_size, 32)
    assert ("lm_head.weight" in tensors) is not config.tied_head
    back = hf.model_parameters(config, dict(tensors), "here")
    jax.tree.map(np.testing.assert_array_equal, back, parameters)


def test_files_of_experts_have_the_names_of_those_on_the_hub():
    names = set(tensors_of_ones(MIXTRAL))
    assert {n for n in names if ".1.block" in n} == {
        "model.layers.1.block_sparse_moe.gate.weight",
        *(f"model.layers.1.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(4) for j in (1, 2, 3)),
    }
    names = set(tensors_of_ones(QWEN3_MOE))
    assert {n for n in names if ".2.mlp." in n} == {
        f"model.layers.2.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    assert {n for n in names if ".3.mlp." in n} == {
        "model.layers.3.mlp.gate.weight",
        *(f"model.layers.3.mlp.experts.{i}.{n}_proj.weight" for i in range(4) for n in ("gate", "up", "down")),
    }


def test_what_layers_share_is_written_once_for_each():
    config = dataclasses.replace(QWEN3_MOE, moe_every=1, shared_layers=True)
    parameters = drawn(config)
    read = hf.model_config(hf.hf_config(config, end_of_text=256, max_length=64), "config.json")
    blocks = hf.model_parameters(read, hf.hf_tensors(config, parameters), "here")["blocks"]
    for layer in range(4):
        for part, whole in parameters["shared_block"].items():
            own = jax.tree.map(lambda x, layer=layer: x[layer], {name: blocks[part][name] for name in whole})
            jax.tree.map(np.testing.assert_array_equal, own, whole)
    for name in ("query_norm", "key_norm"):
        np.testing.assert_array_equal(
            blocks["attention"][name]["scale"], parameters["blocks"]["attention"][name]["scale"]
        )


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window = 4096 can't be imported; the decoder here has None"),
        (
            MIXTRAL,
            {"router_jitter_noise": 0.1},
            "router_jitter_noise = 0.1 can't be imported; the decoder here has 0.0",
        ),
        (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 can't be imported: Mixtral gives"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "experts_per_token = 5 is more than experts = 4"),
        (MIXTRAL, {"num_experts": 8}, "num_experts is both 4 and 8|num_experts is both 8 and 4"),
        (MIXTRAL, {"num_local_experts": None}, "has no num_experts"),
        (MIXTRAL, {"num_local_experts": 0}, "num_experts = 0: input should be greater than"),
        (MIXTRAL, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not known"),
        (QWEN3_MOE, {"norm_topk_prob": False}, "norm_topk_prob = False can't be imported with num_experts_per_tok = 2"),
        (QWEN3_MOE, {"norm_topk_prob": None}, "norm_topk_prob = False can't be imported"),  # as the format has it
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "norm_topk_prob = True can't be imported with num_experts_per_tok = 1"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] can't be imported"),
        (QWEN3_MOE, {"decoder_sparse_step": 3}, "layers = 4 must be a multiple of moe_every = 3"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not known"),
        (ModelConfig(), {"num_experts": 4}, "num_experts = 4 is not known to the decoder here"),
    ],
)
def test_what_the_decoder_lacks_of_experts_is_named(kind, change, message):
    content = hf.hf_config(kind, end_of_text=256, max_length=64) | change
    with pytest.raises(UserError, match=message):
        hf.model_config(content, "config.json")


def test_settings_of_experts_that_change_nothing_are_taken():
    """As the files of Mixtral-8x7B and Qwen3-30B-A3B have them, and as transformers 5 writes them."""
    training = {"output_router_logits": False, "router_aux_loss_coef": 0.02}
    of_mixtral = hf.hf_config(MIXTRAL, end_of_text=256, max_length=64) | training
    more = {"sliding_window": None, "router_jitter_noise": 0.0, "head_dim": None}
    assert hf.model_config(of_mixtral | more, "config.json") == dataclasses.replace(MIXTRAL, head_width=8)
    assert hf.model_config(of_mixtral | {"rope_theta": None}, "config.json").rope_theta == 1e6
    of_qwen = hf.hf_config(QWEN3_MOE, end_of_text=256, max_length=64) | training
    newer = {name: value for name, value in of_qwen.items() if name != "num_experts"} | {"num_local_experts": 4}
    for content in (of_qwen | {"sliding_window": 4096, "max_window_layers": 48}, newer | {"mlp_only_layers": None}):
        assert hf.model_config(content, "config.json") == dataclasses.replace(QWEN3_MOE, head_width=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"router": "sigmoid"},
            "model.router = 'sigmoid': neither Mixtral nor Qwen3Moe has that; only .* 'softmax' can",
        ),
        ({"balance": "bias"}, "model.balance = 'bias': neither"),
        ({"shared_expert_width": 16}, "model.shared_expert_width = 16: neither .* with None can be exported"),
        ({"expert_capacity": 1.5}, "model.expert_capacity = 1.5: neither"),
        ({"qk_norm": False, "moe_every": 2}, "model.moe_every = 2 without model.qk_norm: Mixtral has experts in every"),
        (
            {"qk_norm": False, "experts_per_token": 1},
            "model.experts_per_token = 1 without model.qk_norm: Mixtral gives",
        ),
    ],
)
def test_what_the_format_lacks_of_experts_is_named(change, message):
    with pytest.raises(UserError, match=message):
        hf.hf_config(ModelConfig(layers=2, experts=4, **change), end_of_text=256, max_length=64)


def test_experts_that_are_not_those_of_the_configuration_are_named():
    tensors = tensors_of_ones(MIXTRAL)
    for experts, message in [
        (5, r"gate.weight has the shape \(4, 32\), its config.json says \(5, 32\)"),
        (3, r"gate.weight has the shape \(4, 32\), its config.json says \(3, 32\)"),
    ]:
        with pytest.raises(UserError, match=message):
            hf.model_parameters(dataclasses.replace(MIXTRAL, experts=experts), dict(tensors), "here")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(UserError, match=f"here has no tensor {name}"):
        hf.model_parameters(MIXTRAL, {n: x for n, x in tensors.items() if n != name}, "here")
    more = tensors | {name.replace("3", "4"): tensors[name]}
    with pytest.raises(UserError, match=r"experts\.4\.w2\.weight of \(32, 24\), which the decoder here has no use for"):
        hf.model_parameters(MIXTRAL, more, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' can't be imported; llama, qwen3, mixtral, qwen3_moe can"),
        ({"attention_bias": True}, "attention_bias = True can't be imported; the decoder here has False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' can't be imported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' can't be imported"),
        ({"rope_scaling": {"factor": 2.0}}, "factor = 2.0 is not known to the decoder here: remove it"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor = 2.0 is not known"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}, "rope_type is both"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is both 10000.0 and 500000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 can't be imported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 can't be imported; the decoder here has 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention = .* is not known"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default' is no object"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_method': 'fp8'} can't be"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .* can't be imported"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 can't be imported"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0 is not known to the decoder here: remove it"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\] can't be imported"),
        ({"layer_types": 3}, "layer_types = 3 can't be imported"),
        ({"num_attention_heads": "four"}, "config.json: "),
        ({"num_hidden_layers": 3.0}, r"config.json: num_hidden_layers = 3\.0: input should be a valid integer"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers = True: input should be a valid integer"),
        ({"hidden_size": 2**62}, "hidden_size = 4611686018427387904: input should be less than or equal to 16777216"),
        ({"hidden_size": -128}, "hidden_size = -128: input should be greater than or equal to 1"),
        ({"vocab_size": math.nan}, "vocab_size = nan: input should be a valid integer"),
        ({"head_dim": 0}, "head_dim = 0: input should be greater than or equal to 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': input should be a valid boolean"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings = 0: input should be a valid boolean"),
        ({"attention_bias": 0}, "attention_bias = 0 can't be imported; the decoder here has False"),
        ({"rms_norm_eps": "1e-6"}, "config.json: rms_norm_eps = '1e-6': input should be a valid number"),
        ({"rope_theta": math.nan}, "config.json: rope_theta = nan: input should be a finite number"),
        ({"rope_theta": True}, "config.json: rope_theta = True: input should be a valid number"),
        ({"eos_token_id": [0, -1]}, r"config.json: eos_token_id: \[0, -1\] is no token's number"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many': input should be a valid integer"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "auto_map = .* can't be imported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures = .* can't be imported; Qwen3ForCausalLM",
        ),
        ({"text_config": {"hidden_size": 64}}, "text_config = {'hidden_size': 64} is not known to the decoder here"),
        ({"num_key_value_heads": 3}, "heads = 4 must be a multiple of kv_heads = 3"),
    ],
)
def test_what_the_decoder_lacks_is_named(change, message):
    content = hf.hf_config(ModelConfig(), end_of_text=256, max_length=64) | change
    with pytest.raises(UserError, match=message):
        hf.model_config(content, "config.json")


def test_what_a_file_leaves_out_is_as_the_format_says():
    content = hf.hf_config(ModelConfig(), end_of_text=256, max_length=64)
    assert hf.model_config(content | {"num_key_value_heads": None}, "config.json").kv_heads == 4
    assert hf.model_config(content | {"head_dim": None}, "config.json").head_size == 128
    assert hf.model_config(content | {"head_dim": None, "model_type": "llama"}, "config.json").head_size == 32


def test_settings_that_change_nothing_are_taken():
    config = ModelConfig(head_width=32)
    content = hf.hf_config(config, end_of_text=256, max_length=64)
    more = {
        **{"layer_types": ["full_attention"] * 3, "sliding_window": 4096, "quantization_config": None},
        **{"attention_dropout": 0.0, "use_cache": True, "dtype": "bfloat16", "pretraining_tp": 1},
    }
    assert hf.model_config(content | more, "config.json") == config
    together = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0, "factor": None}
    newer = {name: value for name, value in content.items() if not name.startswith("rope")} | {
        "rope_parameters": together
    }
    assert hf.model_config(newer, "config.json").rope_theta == 5e5
    # As some files have it: in two places, alike.
    assert hf.model_config(newer | {"rope_scaling": together, "rope_theta": 5e5}, "config.json").rope_theta == 5e5


def tensors_of_ones(config):
    """As a folder has them; nothing is compiled."""
    shapes = jax.eval_shape(lambda: models.initialize(config.for_platform("cpu"), jax.random.key(0)))
    return hf.hf_tensors(config, jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes))


def test_every_tensor_is_used():
    config = SHAPES[0]
    tensors = tensors_of_ones(config)
    frequencies = (config.rope_theta ** -(np.arange(0, config.head_size, 2) / config.head_size)).astype(np.float16)
    table = tensors["model.embed_tokens.weight"]
    spared = {"lm_head.weight": table.copy(), "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    jax.tree.map(
        np.testing.assert_array_equal,
        hf.model_parameters(config, tensors | spared, "here"),
        hf.model_parameters(config, dict(tensors), "here"),
    )
    for name, array in {
        "model.layers.1.self_attn.q_proj.bias": np.zeros(32),
        "model.layers.2.input_layernorm.weight": np.ones(32),  # of a layer more than there are
        "model.layers.0.mlp.up_proj.weight_scale": np.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies / 4,
    }.items():
        with pytest.raises(UserError, match=rf"here has a tensor {name} of \(.*\), which the decoder .* no use for"):
            hf.model_parameters(config, tensors | {name: array}, "here")
    for head in (2 * table, table[:4]):
        with pytest.raises(
            UserError, match=r"here: its config\.json says tie_word_embeddings, but lm_head\.weight is not"
        ):
            hf.model_parameters(config, tensors | {"lm_head.weight": head}, "here")
    untied = dataclasses.replace(config, tied_head=False)
    with pytest.raises(UserError, match=r"here has no tensor lm_head\.weight"):
        hf.model_parameters(untied, dict(tensors), "here")


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [
        ("float64", True),
        ("float16", True),
        ("bfloat16", True),
        ("int8", False),
        ("uint8", False),
        ("float8_e4m3fn", False),
    ],
)
def test_weights_are_floats_of_16_bits_or_more(tmp_path, dtype, taken):
    from safetensors.flax import save_file

    config = dataclasses.replace(SHAPES[0], layers=1)
    tensors = tensors_of_ones(config)
    name = "model.layers.0.mlp.up_proj.weight"
    with jax.enable_x64(dtype == "float64"):
        save_file(tensors | {name: jnp.ones(tensors[name].shape, dtype)}, tmp_path / "model.safetensors")
    if taken:
        np.testing.assert_array_equal(hf.read_parameters(tmp_path, config)["blocks"]["mlp"]["up"]["kernel"], 1.0)
    else:
        with pytest.raises(UserError, match=rf"{name} is in \w+: quantized weights can't be imported"):
            hf.read_parameters(tmp_path, config)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    from safetensors.flax import save_file

    config = dataclasses.replace(SHAPES[0], layers=1)
    tensors = {name: jnp.asarray(array, dtype) for name, array in tensors_of_ones(config).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].at[7, 5].set(value)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds numbers that aren't finite"):
        hf.read_parameters(tmp_path, config)


def test_a_tensor_twice_in_a_header_is_refused(tmp_path):
    tensor = '{"dtype": "F32", "shape": [4], "data_offsets": [%d, %d]}'
    header = f'{{"a": {tensor % (16, 32)}, "b": {tensor % (16, 32)}, "a": {tensor % (0, 16)}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(UserError, match=r"model\.safetensors: its header has 'a' twice in one object"):
        hf.read_parameters(tmp_path, SHAPES[0])


@pytest.mark.parametrize("size", [0, 1, 7, 2**40, 2**63])
def test_a_header_whose_length_lies_is_refused(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b'{"a": {}}')
    with pytest.raises(UserError, match=r"model\.safetensors.* is damaged"):
        hf.read_parameters(tmp_path, SHAPES[0])


def test_weights_whose_sum_overflows_are_finite(tmp_path):
    from safetensors.numpy import save_file

    config = dataclasses.replace(SHAPES[0], layers=1)
    save_file({name: 3e38 * array for name, array in tensors_of_ones(config).items()}, tmp_path / "model.safetensors")
    assert hf.read_parameters(tmp_path, config)["final_norm"]["scale"][0] == np.float32(3e38)


def test_files_that_are_none_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is no file that can be read to its end"):
        hf.read_parameters(tmp_path, SHAPES[0])
    os.mkfifo(tmp_path / hf.INDEX)
    with pytest.raises(UserError, match=rf"{hf.INDEX} is no file that can be read to its end"):
        hf.read_parameters(tmp_path, SHAPES[0])
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2.0}, "run.json: layers = 2.0: input should be a valid integer"),
        ({"layers": True}, "run.json: layers = True: input should be a valid integer"),
        ({"layers": 0}, "run.json: layers = 0: input should be greater than"),
        ({"width": 2**62}, "run.json: width = 4611686018427387904: input should be less than"),
        ({"rope_theta": math.nan}, "run.json: rope_theta = None: input should be a valid number"),
        ({"colour": 3}, "run.json doesn't describe a decoder: it has 'colour'"),
    ],
)
def test_a_run_that_describes_no_decoder_is_refused(change, message):
    fields = json.loads(json.dumps(SHAPES[1].identity))
    assert trained.decoder(fields, "run.json").identity == SHAPES[1].identity
    with pytest.raises(UserError, match=message):
        trained.decoder(fields | change, "run.json")
    with pytest.raises(UserError, match=r"run\.json doesn't describe a decoder$"):
        trained.decoder({}, "run.json")


@pytest.mark.parametrize("text", ["float32[8, x]", "floaty[8]", "float32[-1]", "float32[9223372036854775808]", ""])
def test_arrays_that_run_json_does_not_describe_are_refused(text):
    wanted = {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    assert stored_shapes({".parameters['a']": "bfloat16[8, 2]"}, wanted, "run")["a"].shape == (8, 2)
    with pytest.raises(UserError, match=r"run: its run\.json has no shape of \['a'\]"):
        stored_shapes({".parameters['a']": text}, wanted, "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            r"lacks two\.safetensors, which its model\.saf",
        ),
        (
            {"weight_map": ["one.safetensors"]},
            r"index\.json: weight_map = \['one\.safetensors'\]: input should be an obj",
        ),
        ({"weight_map": {"a": "../one.safetensors"}}, r"index\.json: weight_map\.a = '\.\./one\.safetensors': "),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "has no tensor b, which its model.saf"),
        ({"weight_map": {}}, r"one\.safetensors: a isn't where model\.safetensors\.index\.json says"),
        ({}, r"index\.json has no weight_map"),
        ([], r"index\.json: \[\]: input should be an object"),
    ],
)
def test_a_part_that_is_missing_is_named(tmp_path, index, message):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        hf.read_parameters(tmp_path, SHAPES[0])


def test_a_tensor_of_two_files_is_refused(tmp_path):
    from safetensors.numpy import save_file

    for file in ("model", "model-00001-of-00001"):
        save_file({"model.norm.weight": np.ones(32, np.float32)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is in another file too"):
        hf.read_parameters(tmp_path, SHAPES[0])


def test_what_the_format_lacks_is_named():
    with pytest.raises(UserError, match=r"logit_soft_cap = 30.0: neither Llama nor Qwen3"):
        hf.hf_config(ModelConfig(logit_soft_cap=30.0), end_of_text=256, max_length=64)
    config = SHAPES[0]
    tensors = hf.hf_tensors(config, models.initialize(config.for_platform("cpu"), jax.random.key(1)))
    del tensors["model.norm.weight"]
    with pytest.raises(UserError, match=r"here has no tensor model.norm.weight"):
        hf.model_parameters(config, dict(tensors), "here")


@pytest.mark.slow
def test_a_run_is_exported_and_gone_on_with(run, small_bindings, tmp_path):
    folder, loss = run
    export(folder, tmp_path / "hf")
    readable = 0o666 & ~umask()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {readable}
    mine, theirs = trained.load(folder), trained.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, mine.parameters, theirs.parameters)
    assert mine.tokenizer.encode("né").tolist() == theirs.tokenizer.encode("né").tolist()
    with pytest.raises(UserError, match="is not empty"):
        export(folder, tmp_path / "hf")
    # The same text, gone on with at a rate of almost nothing: the loss is where it was.
    more = [*small_bindings, *import_hf.bindings(tmp_path / "hf", peak=1e-9), "TOTAL_EXAMPLES = 16"]
    bound = configurables.bind(train, ["debug.gin"], own=more)
    assert bound(run=str(tmp_path / "more"))["loss"] == pytest.approx(loss, abs=1e-4)
    configurables.bind(train, ["debug.gin"], ["train.optimizer = @lion()"], own=more)
    assert "lion(learning_rate=rewarm(peak=1e-09))" in references.written("experiments.train", "optimizer")


def test_an_earlier_checkpoint_is_exported_and_started_from(run, small_bindings, tmp_path, monkeypatch):
    folder, _ = run
    earlier, newest = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    export_command.main([str(folder), "--to", "hf", "--at", str(earlier), "--out", str(tmp_path / "hf")])
    at, last = trained.load(folder, earlier), trained.load(folder)
    assert (at.examples_seen, last.examples_seen) == (earlier, newest)
    jax.tree.map(np.testing.assert_array_equal, at.parameters, trained.load(tmp_path / "hf").parameters)
    table = at.parameters["embedding"]["table"]
    assert (table != last.parameters["embedding"]["table"]).any()
    starts = []
    monkeypatch.setattr(Session, "fresh_state", lambda self, parameters: starts.append(parameters) or 1 / 0)
    configurables.bind(train, ["debug.gin"], own=small_bindings)
    with pytest.raises(ZeroDivisionError):
        fresh_state(Session(**session_options(configurables.arguments(train))), f"{folder}@{earlier}")
    np.testing.assert_array_equal(starts[0]["embedding"]["table"], table)
    there = rf"no checkpoint at 7 examples: give one that it has \({earlier}, {newest}\)"
    for call in (lambda: trained.load(folder, 7), lambda: generate_command.main([str(folder), "--at", "7"])):
        with pytest.raises(UserError, match=there):
            call()
    with pytest.raises(UserError, match="in Hugging Face's format, which has no checkpoint at 7"):
        trained.load(tmp_path / "hf", 7)


def test_damaged_parameters_are_refused(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "damaged")
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    meta = newest / "meta" / "metadata"
    first = json.loads(meta.read_text())["fingerprints"][0]
    meta.write_text(meta.read_text().replace(str(first), str(first ^ 1)))
    with pytest.raises(UserError, match=rf"{newest} is damaged \(its metadata are not .* move it away"):
        trained.load(folder)
    shutil.rmtree(newest)  # as it says
    assert trained.load(folder).examples_seen < int(newest.name)


def test_another_shape_is_refused(run, small_bindings):
    for binding, message in [
        ("model.width = 32", r"its blocks.attention.key.kernel is \(1, 16, 1, 8\), this model's \(1, 32, 1, 16\)"),
        (
            "model.qk_norm = False",
            r"this model, as it alone has \['blocks'\]\['attention'\]\['key_norm'\].*set model.qk_norm",
        ),
    ]:
        start = [f"train.initialize_from = '{run[0]}'", binding]
        configurables.bind(train, ["debug.gin"], start, own=small_bindings)
        with pytest.raises(UserError, match=message):
            fresh_state(Session(**session_options(configurables.arguments(train))), str(run[0]))


def test_a_table_with_fewer_rows_than_tokens_is_refused(small_bindings, tmp_path):
    config = ModelConfig(vocab_size=100, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32)
    shapes = jax.eval_shape(lambda: models.initialize(config.for_platform("cpu"), jax.random.key(0)))
    parameters = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    hf.write_folder(tmp_path, config, parameters, trained.SubwordTokenizer.load(bytes_file(tmp_path)), max_length=8)
    configurables.bind(train, ["debug.gin"], own=[*small_bindings, "model.head_width = 8"])
    session = Session(**session_options(configurables.arguments(train)))
    with pytest.raises(
        UserError, match=r"its embedding\.table has 100 rows, and the data's tokenizer 257 tokens: read"
    ):
        fresh_state(session, str(tmp_path))


@pytest.fixture
def experts(tmp_path):
    """A folder with Mixtral's experts, as wide as the small runs', and its parameters."""
    config = ModelConfig(
        vocab_size=384, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, qk_norm=False, experts=4, expert_width=24
    )
    parameters = random_parameters(config)
    hf.write_folder(
        tmp_path / "hf", config, parameters, trained.SubwordTokenizer.load(bytes_file(tmp_path)), max_length=32
    )
    return tmp_path / "hf", parameters


def test_a_run_begins_as_a_model_with_experts(experts, small_bindings):
    folder, parameters = experts
    own = [binding for binding in small_bindings if not binding.startswith("model.")]

    def begun(*bindings):
        configurables.bind(train, ["debug.gin"], bindings, own=[*own, *import_hf.bindings(folder, peak=1e-3)])
        return fresh_state(Session(**session_options(configurables.arguments(train))), str(folder)).parameters

    jax.tree.map(np.testing.assert_array_equal, begun("model.balance_loss = 0.02", "model.dropout = 0.1"), parameters)
    for binding, message in [
        (
            "model.shared_expert_width = 16",
            r"as this model alone has \['blocks'\]\['mlp'\]\['shared'\].* about experts",
        ),
        ("model.experts = 8", r"its blocks\.mlp\.down is \(2, 4, 24, 16\), this model's \(2, 8, 24, 16\)"),
    ]:
        with pytest.raises(UserError, match=message):
            begun(binding)
    configurables.bind(train, ["debug.gin"], ["model.qk_norm = False"], own=small_bindings)
    with pytest.raises(UserError, match=r"as it alone has \['blocks'\]\['mlp'\]\['down'\]:"):
        fresh_state(Session(**session_options(configurables.arguments(train))), str(folder))


@pytest.mark.slow
def test_a_model_with_experts_is_gone_on_with_evaluated_and_generates(experts, small_bindings, tmp_path):
    folder, _ = experts
    before = trained.load(folder)
    assert len(list(generate(before, "batch ", tokens=4, temperature=0.0))) <= 4
    own = [*small_bindings, *import_hf.bindings(folder, peak=1e-3)]
    ended = configurables.bind(train, ["debug.gin"], own=own)(run=str(tmp_path / "more"))
    _, _, found = evaluate(tmp_path / "more")
    assert found["validation"].means["loss"] == pytest.approx(ended["loss"], rel=1e-5)
    assert ended["loss"] < read_run(tmp_path / "more").train["loss"][0] - 0.2


def test_what_an_export_leaves_that_is_cut_short_is_no_model(tmp_path, monkeypatch):
    config = ModelConfig(vocab_size=257, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32)
    shapes = jax.eval_shape(lambda: models.initialize(config.for_platform("cpu"), jax.random.key(0)))
    tokenizer = trained.SubwordTokenizer.load(bytes_file(tmp_path))

    def write(value):
        parameters = jax.tree.map(lambda x: np.full(x.shape, value, np.float32), shapes)
        hf.write_folder(tmp_path / "hf", config, parameters, tokenizer, max_length=8)

    write(1.0)
    assert hf.read_config(tmp_path / "hf").layers == 1
    kept = hf.hf_tensors
    monkeypatch.setattr(hf, "hf_tensors", lambda *given: 1 / 0)  # as a kill would, while the weights are written
    with pytest.raises(ZeroDivisionError):
        write(2.0)
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.read_config(tmp_path / "hf")
    monkeypatch.setattr(hf, "hf_tensors", kept)
    write(2.0)
    assert hf.read_config(tmp_path / "hf").layers == 1


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json"):
        trained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        trained.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf.hf_config(ModelConfig(), end_of_text=0, max_length=8)))
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        trained.load(tmp_path)


# `models/test_decode.py` looks at decoding with the cache quickly.
@pytest.mark.slow
@pytest.mark.parametrize("config", SHAPES, ids=KINDS)
def test_the_cache_changes_nothing(config):
    config = config.for_platform("cpu")
    parameters = models.initialize(config, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 20)), jnp.int32)
    wanted = uncached(trained.Trained(config, parameters, None, None, None), tokens)  # type: ignore[arg-type]
    # A prompt of 7 tokens padded to 12, then five at once, then one by one.
    cache = empty_cache(config, 2, 24)
    step = jax.jit(lambda *a: decode(config, parameters, *a))
    padded = jnp.pad(tokens[:, :7], ((0, 0), (0, 5)))
    found, cache = step(padded, 0, cache)
    parts = [found[:, :7]]
    for begin, end in [(7, 12), *((i, i + 1) for i in range(12, 20))]:
        found, cache = step(tokens[:, begin:end], begin, cache)
        parts.append(found)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), wanted, atol=2e-5)


# The compiled program takes subnormal logits for 0, NumPy's order does not.
@given(st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=5, max_size=5, unique=True), st.data())
@settings(max_examples=12, deadline=None)
def test_draws_stay_within_what_they_may_take(logits, data):
    logits_BV = jnp.asarray([logits], jnp.float32)
    order = np.argsort(logits)[::-1]
    shares = np.sort(np.asarray(jax.nn.softmax(logits_BV[0])))[::-1]
    top_k = data.draw(st.integers(1, len(logits)))
    top_p = data.draw(st.floats(0.05, 0.99))
    key = jax.random.key(data.draw(st.integers(0, 1000)))
    assert int(sample(logits_BV, key, temperature=0.0)[0]) == order[0]
    assert int(sample(logits_BV, key, top_k=top_k)[0]) in order[:top_k]
    allowed = int(np.searchsorted(np.cumsum(shares), top_p * 0.999)) + 1
    assert int(sample(logits_BV, key, top_p=top_p)[0]) in order[: allowed + 1]


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    drawn = sample(jnp.tile(logits, (20_000, 1)), jax.random.key(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, [0.5, 0.3, 0.2], atol=0.02)


def test_a_run_goes_on_with_a_text(run):
    model = trained.load(run[0])
    greedy = list(generate(model, "batch ", tokens=12, temperature=0.0))
    # The same by the whole forward pass for every token; what comes behind changes nothing before it.
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, :7] = [256, *model.tokenizer.encode("batch ").tolist()]
    whole = jax.jit(lambda tokens: uncached(model, tokens)[0, :, : model.tokenizer.vocab_size])
    for place in range(7, 7 + len(greedy)):
        tokens[0, place] = jnp.argmax(whole(tokens)[place - 1])
    assert greedy == tokens[0, 7 : 7 + len(greedy)].tolist()
    small = model._replace(config=dataclasses.replace(model.config, vocab_size=100))
    for prompt, what in [("batch", "the tokenizer's end of text is number 256, and"), ("né", "the tokenizer's end")]:
        with pytest.raises(UserError, match=what):
            next(generate(small, prompt))
    once, again = (list(generate(model, "batch ", tokens=12, seed=3)) for _ in range(2))
    assert once == again != list(generate(model, "batch ", tokens=12, seed=4))
    for values, message in [({"tokens": 0}, "--tokens 0"), ({"top_p": 0.0}, "top_p = 0"), ({"top_k": 0}, "top_k = 0")]:
        with pytest.raises(UserError, match=message):
            next(generate(model, "", **values))


def test_characters_are_shown_when_they_are_whole():
    model = trained.Trained(ModelConfig(), {}, ByteTokenizer(), None, None)  # type: ignore[arg-type]
    text = "né → 字"
    pieces = list(stream(model, "", iter(ByteTokenizer().encode(text).tolist())))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all("\ufffd" not in piece for piece in pieces)


def sentence_piece() -> tokenizers.Tokenizer:
    """Words with the space before them in their token, which the first one of a text loses."""
    words = [(f"▁{word}", -1.0) for word in ("the", "value", "of", "su", "then")] + [("s", -1.0), ("▁", -2.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *words], unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return made


def word_piece() -> tokenizers.Tokenizer:
    """Spaces between words, but none before "##" and stops, though these are tokens of their own."""
    words = ["the", "value", "##s", "of", ".", "[UNK]", "</s>"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    parts = [tokenizers.decoders.WordPiece(cleanup=False), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Replace(" .", ".")])
    return made


@pytest.mark.parametrize(
    ("make", "prompt", "words", "text"),
    [
        (sentence_piece, "the value of the", ["▁su", "▁then"], " su then"),
        (sentence_piece, "the value", ["s", "▁of"], "s of"),
        (sentence_piece, "", ["▁the", "▁value"], "the value"),
        (word_piece, "the", ["value", "##s", "of", ".", "the"], " values of. the"),
    ],
)
def test_what_is_shown_is_what_the_tokens_add_to_the_prompt(make, prompt, words, text):
    tokenizer = trained.SubwordTokenizer(make())
    model = trained.Trained(ModelConfig(), {}, tokenizer, None, None)
    tokens = [make().token_to_id(word) for word in words]
    pieces = list(stream(model, prompt, iter(tokens)))
    assert "".join(pieces) == text
    assert len(pieces) > 1


CHECK = """
import sys, numpy, torch, transformers
folder, tokens, logits = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
assert tokenizer.decode(tokenizer("batch size").input_ids) == "batch size"
with torch.no_grad():
    numpy.save(logits, model(torch.from_numpy(numpy.load(tokens)).long()).logits.numpy())
"""


def transformers(code: str, *arguments: str) -> None:
    """Runs some code in a process of its own, and so under any Python that has torch and transformers."""
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if python == sys.executable and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        pytest.skip("needs torch and transformers (the extra hf), or TRANSFORMERS_PYTHON, a Python that has them")
    subprocess.run([python, "-c", code, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("config", SHAPES, ids=KINDS)
def test_transformers_reproduces_the_logits(config, tmp_path):
    config = config.for_platform("cpu")
    parameters = random_parameters(config)
    tokenizer = trained.SubwordTokenizer.load(bytes_file(tmp_path))
    hf.write_folder(tmp_path / "hf", config, parameters, tokenizer, max_length=64)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 50)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    transformers(CHECK, *(str(tmp_path / name) for name in ("hf", "tokens.npy", "logits.npy")))
    ours = uncached(trained.Trained(config, parameters, tokenizer, None, None), jnp.asarray(tokens))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours, atol=1e-4)


# The norms' scales too: exchanged ones would show.
MAKE = """
import sys, numpy, torch, transformers
folder, tokens, logits = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
for name, weight in model.named_parameters():
    drawn = torch.randn(weight.shape, generator=generator)
    weight.data = 1 + drawn / 4 if weight.dim() == 1 else drawn * weight.shape[-1] ** -0.5
model.save_pretrained(folder, max_shard_size="20KB")
with torch.no_grad():
    numpy.save(logits, model(torch.from_numpy(numpy.load(tokens)).long()).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", SHAPES, ids=KINDS)
def test_the_logits_of_transformers_are_reproduced(config, tmp_path):
    (tmp_path / "hf").mkdir()
    content = hf.hf_config(config, end_of_text=256, max_length=64)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    shutil.copy(bytes_file(tmp_path), tmp_path / "hf" / "tokenizer.json")
    tokens = np.random.default_rng(0).integers(0, 257, (2, 50)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    transformers(MAKE, *(str(tmp_path / name) for name in ("hf", "tokens.npy", "logits.npy")))
    model = trained.load(tmp_path / "hf")
    ours = uncached(model._replace(parameters=jax.tree.map(jnp.asarray, model.parameters)), jnp.asarray(tokens))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours, atol=1e-4)


def bytes_file(folder):
    path = folder / "bytes.json"
    path.write_text(ByteTokenizer().to_json(), encoding="utf-8")
    return path

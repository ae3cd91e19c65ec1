"""`benchmark train --peer`: peers take the step that ours takes, and what isn't one is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crescendo import models
from crescendo.experiments.__main__ import main
from crescendo.experiments.benchmarks import beside, peers
from crescendo.experiments.benchmarks.peers import jax as plain
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runtime.errors import UserError
from crescendo.models import ModelConfig
from crescendo.models.loss import next_token_loss


def as_plain(parameters):
    """Our parameters as the peer has them."""

    def layer(number):
        of_layer = jax.tree.map(lambda x: x[number], parameters["blocks"])
        matrices = {name: of_layer["attention"][name]["kernel"] for name in ("query", "key", "value", "output")}
        matrices |= {name: of_layer["mlp"][name]["kernel"] for name in ("gate", "up", "down")}
        flat = {
            name: x.reshape(-1, x.shape[-1]) if name == "output" else x.reshape(len(x), -1)
            for name, x in matrices.items()
        }
        return flat | {name: of_layer[name]["scale"] for name in ("attention_norm", "mlp_norm")}

    layers = [layer(number) for number in range(len(parameters["blocks"]["mlp_norm"]["scale"]))]
    tables = {"embedding": parameters["embedding"]["table"], "final_norm": parameters["final_norm"]["scale"]}
    return tables | {"layers": layers}


def test_the_jax_peers_loss_and_gradients_are_ours(quick_compilation):
    seed = np.random.SeedSequence().entropy % 2**32
    model = ModelConfig(vocab_size=128, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, qk_norm=False)
    model = model.for_platform("cpu")
    rows = RandomText(model.vocab_size, 12).take([seed, seed + 1])
    random, shapes = (
        np.random.default_rng(seed),
        jax.eval_shape(lambda key: models.initialize(model, key), jax.random.key(0)),
    )
    parameters = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape, np.float32), shapes)

    def loss_of_ours(parameters):
        total, weight = next_token_loss(model, parameters, rows, implementation="reference")
        return total / weight

    def loss_of_theirs(parameters):
        return plain.mean_loss(model, parameters, rows["tokens"], rows["labels"])

    ours, of_ours = jax.device_get(jax.jit(jax.value_and_grad(loss_of_ours))(parameters))
    theirs, of_theirs = jax.device_get(jax.jit(jax.value_and_grad(loss_of_theirs))(as_plain(parameters)))
    # Float32, in another order of sums.
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, err_msg=f"seed {seed}")
    for a, b in zip(jax.tree.leaves(of_theirs), jax.tree.leaves(as_plain(of_ours)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=f"seed {seed}")


@pytest.mark.slow
def test_the_torch_peers_steps_are_the_jax_peers(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from crescendo.experiments.benchmarks.peers import torch as hugging_face

    networks = []
    monkeypatch.setattr(torch, "compile", lambda network: networks.append(network) or network)
    model = ModelConfig.preset("debug", layers=1, qk_norm=False).for_platform("cpu")
    rows = RandomText(model.vocab_size, 12).take([0, 1])
    prepared = hugging_face.prepare(model, rows)
    arrays = {name: jnp.array(x.detach().numpy()) for name, x in networks[0].state_dict().items()}
    of_attention = {name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")}
    matrices = of_attention | {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    layer = {name: arrays[f"model.layers.0.{theirs}.weight"].T for name, theirs in (matrices | norms).items()}
    tables = {"embedding": arrays["model.embed_tokens.weight"], "final_norm": arrays["model.norm.weight"]}
    parameters, optimizer = tables | {"layers": [layer]}, optax.adamw(3e-4)
    state = optimizer.init(parameters)
    loss_of = jax.jit(jax.value_and_grad(lambda p: plain.mean_loss(model, p, rows["tokens"], rows["labels"])))
    for _ in range(3):
        loss, gradient = loss_of(parameters)
        # Float32, in another order of sums, and with another weight decay: 3e-4 of 1e-2 and of 1e-4.
        np.testing.assert_allclose(prepared.read(prepared.step()), loss, rtol=1e-5)
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)


def test_the_jax_peer_has_our_parameters_but_for_two_norms():
    model = ModelConfig.preset("124m")
    theirs, ours = (
        jax.eval_shape(lambda key, f=f: f(model.for_platform("gpu"), key), jax.random.key(0))
        for f in (plain.initialize, models.initialize)
    )
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (("ours", ours), ("jax", theirs))}
    measured = {
        name: beside.Measured(
            device="H200",
            platform="gpu",
            parameter_count=n,
            seconds=[1.0],
            first_loss=0.0,
            peak_bytes=1,
            begin_seconds=0.0,
        )
        for name, n in count.items()
    }
    beside.check_alike(model, measured)
    for changed, says in (
        ({"parameter_count": 7}, "7 parameters"),
        ({"device": "cpu"}, "ran on cpu, and ours on H200"),
    ):
        with pytest.raises(UserError, match=f"^--peer jax .*{says}"):
            beside.check_alike(model, measured | {"jax": measured["jax"].model_copy(update=changed)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--peer", "tensor"], "--peer tensor: there is no such peer; there are jax, torch"),
        (["--peer", "jax", "--remat", "dots"], "--remat is of our step alone"),
        (["--peer", "jax", "--documents-in-row", "2"], "--documents-in-row is of our step alone"),
        (["--peer", "jax", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--peer", "jax", "--json", "/proc/none/a.json"], "cannot write /proc/none"),
        (["--json", "a.json"], "--json is of a comparison: add --peer"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_timed(options, says, monkeypatch):
    monkeypatch.setattr(beside, "measure_elsewhere", None)
    with pytest.raises(UserError, match=f"^{says}"):
        main(["benchmark", "train", "debug", *options])


def test_a_peer_whose_packages_are_missing_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^--peer torch needs torch and transformers, .*: pip install 'crescendo\[hf\]'$"
    ):
        main(["benchmark", "train", "debug", "--peer", "torch"])


@pytest.mark.slow
def test_a_process_that_fails_is_told_in_a_line():
    work = beside.Work(preset="debug", sequence_length=7, batch_size=1, steps=0)
    with pytest.raises(UserError, match=r"^debug, tensor: --peer tensor: there is no such peer"):
        beside.measure_elsewhere("tensor", work)


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.names())
def test_a_peer_beside_ours(name, tmp_path, capsys):
    try:
        peers.peer(name)
    except UserError as missing:
        pytest.skip(str(missing))
    shape = ["--sequence-length", "32", "--batch-size", "2", "--steps", "1", "--rounds", "2"]
    main(["benchmark", "train", "debug", *shape, "--peer", name, "--json", str(tmp_path / "a.json")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["ours", name]
    (read,) = json.loads((tmp_path / "a.json").read_text())
    for its in read["measured"].values():
        assert len(its) == 2
        # Random parameters: each token about as likely as every other.
        assert all(abs(each["first_loss"] - np.log(384)) < 0.5 and min(each["seconds"]) > 0 for each in its)

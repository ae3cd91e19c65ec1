"""The decoder against an independent float64 version of its maths, and the invariances that packing needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crescendo import models
from crescendo.models import ModelConfig
from crescendo.models.loss import cross_entropy, next_token_loss

SMALL = ModelConfig(vocab_size=50, width=24, layers=3, heads=4, kv_heads=2, mlp_width=40, head_width=8)


def on_cpu(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes).for_platform("cpu")


@pytest.fixture(scope="module")
def parameters():
    return models.initialize(on_cpu(), jax.random.key(0))


@pytest.fixture(scope="module")
def packed():
    random = np.random.default_rng(1)
    segment_ids = np.array([[1] * 5 + [2] * 6 + [0], [1] * 12, [1] + [2] + [3] * 10])
    positions = np.array([[*range(5), *range(6), 0], [*range(12)], [0, 0, *range(10)]])
    draw = lambda: random.integers(0, SMALL.vocab_size, size=(3, 12))  # noqa: E731
    batch = {"tokens": draw(), "labels": draw(), "segment_ids": segment_ids, "positions": positions}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, parameters, batch):
    model = models.apply(config, parameters)
    return model(batch["tokens"], batch["segment_ids"], batch["positions"])


def written_from_the_maths(config: ModelConfig, parameters, tokens, segment_ids, positions):
    """Final hidden states of one row [T], in float64 NumPy, one head and one query at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * scale

    def turn(x, position):
        half = config.head_size // 2
        angle = position * config.rope_theta ** (-np.arange(half) * 2 / config.head_size)
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag])

    x = p["embedding"]["table"][tokens]
    for i in range(config.layers):
        block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        a, h = block["attention"], norm(x, block["attention_norm"]["scale"])
        out = np.zeros_like(x)
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            q, k = h @ a["query"]["kernel"][:, head], h @ a["key"]["kernel"][:, shared]
            v = h @ a["value"]["kernel"][:, shared]
            if config.qk_norm:
                q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
            q = np.stack([turn(row, at) for row, at in zip(q, positions, strict=True)])
            k = np.stack([turn(row, at) for row, at in zip(k, positions, strict=True)])
            for t in range(len(x)):
                seen = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
                score = np.array([q[t] @ k[s] for s in seen]) / np.sqrt(config.head_size)
                weight = np.exp(score - score.max())
                out[t] += (weight / weight.sum()) @ v[seen] @ a["output"]["kernel"][head]
        x = x + out
        h = norm(x, block["mlp_norm"]["scale"])
        gate = h @ block["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["mlp"]["up"]["kernel"])) @ block["mlp"]["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_equals_the_maths_in_float64(packed, qk_norm):
    config = on_cpu(qk_norm=qk_norm)
    parameters = models.initialize(config, jax.random.key(2))
    ours = hidden(config, parameters, packed)
    for row in range(3):
        expected = written_from_the_maths(
            config, parameters, *(np.asarray(packed[name][row]) for name in ("tokens", "segment_ids", "positions"))
        )
        np.testing.assert_allclose(ours[row], expected, rtol=0, atol=2e-5)  # float32, values near 1


def gradients(config, parameters, batch):
    return jax.jit(jax.value_and_grad(lambda p: next_token_loss(config, p, batch)[0]))(parameters)


@pytest.fixture(scope="module")
def unrolled_gradients(parameters, packed):
    return gradients(on_cpu(scan_layers=False), parameters, packed)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(True, "full"), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((True, "none"), (False, "dots")))],
)
def test_scan_and_remat_change_no_loss_and_no_gradient(parameters, packed, unrolled_gradients, scan_layers, remat):
    expected = unrolled_gradients
    ours = gradients(on_cpu(scan_layers=scan_layers, remat=remat), parameters, packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, expected)


def test_full_remat_keeps_each_layers_input_and_nothing_else_of_its_activations(parameters, packed):
    config = on_cpu(scan_layers=True, remat="full")
    residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: next_token_loss(config, p, packed)[0], p)[1], parameters)
    rows = packed["tokens"].shape
    kept = [x.shape for x in jax.tree.leaves(residuals) if x.shape[:3] == (config.layers, *rows)]
    assert kept == [(config.layers, *rows, config.width)]


def test_parameters_do_not_depend_on_how_layers_run():
    unrolled, scanned = (models.initialize(on_cpu(scan_layers=scan), jax.random.key(0)) for scan in (False, True))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), unrolled, scanned))


def test_a_packed_document_gives_the_same_as_alone(parameters, packed):
    config = on_cpu()
    together = hidden(config, parameters, packed)[0, 5:11]
    alone = {name: x[:1, 5:11] for name, x in packed.items()} | {"segment_ids": jnp.ones((1, 6), jnp.int32)}
    np.testing.assert_allclose(together, hidden(config, parameters, alone)[0], atol=1e-5)


def test_a_token_sees_neither_the_future_nor_another_document(parameters, packed):
    config = on_cpu()
    changed = packed | {"tokens": packed["tokens"].at[0, 7].add(1)}
    before, after = hidden(config, parameters, packed)[0], hidden(config, parameters, changed)[0]
    np.testing.assert_array_equal(before[:7], after[:7])
    assert (before[7:11] != after[7:11]).any(axis=-1).all()


def test_padding_counts_neither_in_the_loss_nor_in_the_weight(parameters, packed):
    config = on_cpu()
    loss_of = jax.jit(lambda batch: next_token_loss(config, parameters, batch))
    other = (packed["labels"][0, 11] + 1) % config.vocab_size
    changed = packed | {name: packed[name].at[0, 11].set(other) for name in ("labels", "tokens")}
    loss, weight = loss_of(packed)
    assert float(weight) == 35
    assert float(loss_of(changed)[0]) == float(loss)


def test_cross_entropy_equals_the_maths():
    random = np.random.default_rng(3)
    hidden, table = random.normal(size=(2, 5, 7)), random.normal(size=(11, 7))
    labels, weights = random.integers(0, 11, size=(2, 5)), random.integers(0, 2, size=(2, 5))
    logits = 4.0 * np.tanh(hidden @ table.T / 4.0)
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - np.take_along_axis(logits, labels[..., None], -1)[..., 0] + 1e-2 * log_z**2
    arguments = (jnp.float32(hidden), jnp.float32(table), jnp.int32(labels), jnp.float32(weights))
    loss, weight = cross_entropy(*arguments, z_loss=1e-2, soft_cap=4.0)
    np.testing.assert_allclose(loss, (losses * weights).sum(), rtol=1e-5)
    assert float(weight) == weights.sum()


def test_untied_head_has_its_own_table():
    config = on_cpu(tied_head=False)
    parameters = models.initialize(config, jax.random.key(0))
    assert parameters["head"]["table"].shape == (50, 24)
    output = models.apply(config, parameters).output_table()
    np.testing.assert_array_equal(output, parameters["head"]["table"])


def test_bfloat16_compute_keeps_float32_parameters_and_is_close(parameters, packed):
    config = on_cpu(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(models.initialize(config, jax.random.key(0)))} == {jnp.dtype("float32")}
    ours = hidden(config, parameters, packed)
    exact = hidden(on_cpu(), parameters, packed)
    assert ours.dtype == jnp.bfloat16
    error = jnp.linalg.norm(ours.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < 2e-2  # bfloat16 keeps 8 bits, and errors add up over 3 layers


def test_residual_outputs_start_small(parameters):
    mlp = parameters["blocks"]["mlp"]
    assert np.std(mlp["up"]["kernel"]) == pytest.approx(24**-0.5, rel=0.1)
    assert np.std(mlp["down"]["kernel"]) == pytest.approx(40**-0.5 / 6**0.5, rel=0.1)


def test_every_parameter_names_its_axes(parameters):
    names = models.logical_axes(on_cpu())
    jax.tree.map(lambda x, axes: pytest.fail(f"{axes}") if len(axes) != x.ndim else None, parameters, names)
    assert names["blocks"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_width")


def test_flops_of_the_presets_are_those_of_their_matrices():
    for name in ("debug", "30m", "124m"):
        config = ModelConfig.preset(name).for_platform("gpu")
        shapes = jax.eval_shape(lambda config=config: models.initialize(config, jax.random.key(0)))
        matrices = sum(x.size for x in jax.tree.leaves(shapes) if x.size > config.layers * config.width)
        attention = 6 * config.layers * config.width * 1024
        assert config.flops_per_token(1024) == 6 * matrices + attention


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers = 0 must be at least 1"),
        ({"heads": 3}, "heads = 3 must be a multiple of kv_heads = 2"),
        ({"heads": 10, "head_width": None}, "width = 24 must be a multiple of heads = 10"),
        ({"head_width": 7}, "width 7 must be even"),
        ({"remat": "some"}, "remat = 'some'"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_unknown_presets_and_undecided_configs_are_refused():
    with pytest.raises(ValueError, match="no preset '124'; there are debug, 30m, 124m, 1b"):
        ModelConfig.preset("124")
    with pytest.raises(ValueError, match="undecided"):
        models.initialize(SMALL, jax.random.key(0))

"""The resolver: who serves a call, what is said when nobody does, and how the device is known."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels.op import AbstractDevice, Unsupported, explain, leave_to_others, op, target, target_device
from crescendo.pallas_kernels.sharded import sharded

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def picky(x, power):
    if target_device().platform != "gpu":
        raise Unsupported("needs a GPU")
    return x**power * 10


def plain(x, power):
    return x**power


def modest(x, power):
    leave_to_others("is slower than the next one")
    return x**power * 100


def broken(x, power):
    raise NotImplementedError("a gap in a library is no answer")


@pytest.fixture
def raised(monkeypatch):
    """The op `raised`: a picky implementation, then one that needs a package that isn't there, then a plain one."""
    for name, function in {"picky": picky, "plain": plain, "broken": broken, "modest": modest}.items():
        module = types.ModuleType(f"made_up_{name}")
        module.raised = function
        monkeypatch.setitem(sys.modules, module.__name__, module)

    @op({"picky": "made_up_picky", "absent": "no_such_package.raised", "plain": "made_up_plain"})
    def raised(x, *, power=2):
        """x to a power."""
        if power < 0:
            raise ValueError(f"power must be >= 0, not {power}")
        return {"x": x, "power": power}

    return raised


def test_the_first_that_serves_is_taken(raised):
    assert raised(3.0) == 9.0
    assert raised(3.0, power=3, implementation=("picky", "plain")) == 27.0
    with target(H100):
        assert raised(3.0) == 90.0


def test_a_named_implementation_fails_loudly_and_names_what_would_work(raised):
    with pytest.raises(NotImplementedError, match=r"raised on cpu \(cpu\): picky: needs a GPU; .*'plain' serves it"):
        raised(3.0, implementation="picky")
    with pytest.raises(NotImplementedError, match="needs the package no_such_package"):
        raised(3.0, implementation=("absent",))


def test_one_that_leaves_a_call_to_others_serves_it_when_asked_by_name(raised):
    both = op({"modest": "made_up_modest", "plain": "made_up_plain"})(raised.check)
    assert both(3.0) == 9.0
    assert both(3.0, implementation="modest") == 900.0
    assert explain(both, 3.0).chosen == "plain"
    assert "slower than the next" in str(explain(both, 3.0))


def test_unknown_names_and_bad_arguments_are_the_users_mistakes(raised):
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        raised(3.0, implementation="plane")
    with pytest.raises(ValueError, match="power must be >= 0, not -1"):
        raised(3.0, power=-1)
    with pytest.raises(ValueError, match="no implementation 3"):
        raised(3.0, implementation=3)
    with pytest.raises(ValueError, match="names none"):
        raised(3.0, implementation=())


def test_an_error_inside_an_implementation_is_not_taken_for_an_answer(raised):
    @op({"broken": "made_up_broken", "plain": "made_up_plain"})
    def raised(x, *, power=2):
        return {"x": x, "power": power}

    with pytest.raises(NotImplementedError, match="a gap in a library"):
        raised(3.0)


def test_explain_prints_every_answer(raised):
    answers = explain(raised, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert answers.chosen == "plain"
    assert str(answers).splitlines() == [
        "raised on cpu (cpu): plain",
        "  picky: needs a GPU",
        "  absent: needs the package no_such_package, which is not installed",
        "  plain: serves this call",
    ]
    with target(H100):
        assert explain(raised, jax.ShapeDtypeStruct((2,), jnp.float32)).chosen == "picky"


def test_a_cached_trace_for_one_device_is_not_used_for_another(raised):
    call = jax.jit(lambda x: raised(x))
    assert call(3.0) == 9.0
    with target(H100):
        assert "10.0" in str(call.trace(3.0).jaxpr)
    assert call(3.0) == 9.0


def gram(q, k):
    return (jnp.sort(jnp.einsum("bthe,bshe->btsh", q, k), axis=2),)


GRAM = sharded(gram, ["b t h e", "b s h e"], ["b t s h"], batch=["b", "h"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_like_dimensions_are_split_and_nothing_is_gathered(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(8, 5, 4, 3)).astype("f"), rng.normal(size=(8, 6, 4, 3)).astype("f")
    where = NamedSharding(mesh, P("data", None, "model"))
    with jax.set_mesh(mesh):
        arrays = jax.device_put(q, where), jax.device_put(k, where)
        compiled = jax.jit(GRAM).lower(*arrays).compile()
        (result,) = compiled(*arrays)
    assert "all-gather" not in compiled.as_text()
    assert result.sharding.spec == P("data", None, None, "model")
    np.testing.assert_allclose(result, gram(q, k)[0], rtol=1e-5, atol=1e-5)


def test_under_vmap_and_shard_map_too():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(4, 2, 5, 2, 3)).astype("f"), rng.normal(size=(2, 6, 2, 3)).astype("f")
    mapped = jax.vmap(lambda q: GRAM(q, k)[0])(q)
    expected = np.stack([gram(row, k)[0] for row in q])
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(lambda q, k: GRAM(q, k)[0], mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(spread)(q[0], k), expected[0], rtol=1e-5, atol=1e-5)


def test_a_kernel_s_derivative_is_refused_by_name():
    q = jnp.ones((1, 2, 1, 3))
    for differentiate in (jax.grad, lambda loss: jax.jit(jax.grad(loss))):
        with pytest.raises(NotImplementedError, match="a kernel has no second derivatives: pass implementation='ref"):
            differentiate(lambda q: GRAM(q, q)[0].sum())(q)


def test_results_without_the_first_array_s_batch_letter_are_refused():
    for inputs, outputs in ((["b t h e", "b s h e"], ["t b s h"]), (["t h e", "b s h e"], ["t s h"])):
        with pytest.raises(ValueError, match="start with the first array's batch-like letter"):
            sharded(gram, inputs, outputs, batch=["b"])


def test_a_first_call_in_a_process_compiles_once():
    # Implementations are imported in the middle of the first trace: what they import must not change JAX's settings.
    code = """
import jax, jax.numpy as jnp
from crescendo.pallas_kernels.attention import attention

call = jax.jit(lambda q: attention(q, q, q, causal=True))
for _ in range(2):
    call(jnp.ones((1, 8, 2, 8)))
print(call._cache_size())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]

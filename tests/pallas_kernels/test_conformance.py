"""Every implementation of every op, on its calls, against the reference: natively, or in an interpreter.

Nothing here names an op or an implementation but the last tests, of the comparison itself.
"""

import contextlib
import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from crescendo.pallas_kernels import OPS, conformance, tiles
from crescendo.pallas_kernels.bench import specs
from crescendo.pallas_kernels.conformance import HOMES, Case, cases
from crescendo.pallas_kernels.interpreter import interpreted
from crescendo.pallas_kernels.op import op
from crescendo.pallas_kernels.softmax import softmax

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Triton's interpreter changes Triton for the rest of a process: tests/aot has it.
INTERPRETED = sorted(name for name, home in HOMES.items() if home.stand_in and name != "triton")
SEED = int(np.random.default_rng().integers(2**31))
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
TPU = AbstractDevice("TPU v5e", 1, "tpu")


def is_quick(case) -> bool:
    return case.quick


def chosen(found, quick=is_quick):
    return [pytest.param(case, id=str(case), marks=() if quick(case) else pytest.mark.slow) for case in found]


NATIVE = [case for case in cases(platforms=[None])]
FOR_INTERPRETERS = [case for case in cases() if case.implementation in INTERPRETED]


def first_of_each(found):
    """One quick case for each implementation of each op."""
    return {(case.op.__name__, case.implementation): case for case in found[::-1] if case.quick}.values()


@contextlib.contextmanager
def run_where_it_can(case):
    """On small tiles, natively or in an interpreter."""
    with contextlib.ExitStack() as stack:
        for (op_name, kernel), fields in conformance.fine_tiles(case.op).items():
            stack.enter_context(tiles.cut(op_name, kernel, **fields))
        if case.home.stand_in is not None:
            stack.enter_context(interpreted(case.home.stand_in, seed=SEED))
        yield


def dtype_of(case):
    """The one that tells errors apart best; skips calls that the implementation refuses, with its reason."""
    try:
        return conformance.widest_served(case)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", chosen(case for case in NATIVE if case.small and case.implementation != "reference"))
def test_results_and_gradients(case):
    with run_where_it_can(case):
        conformance.check(case, "float32", SEED)


@pytest.mark.parametrize("case", chosen(filter(is_quick, NATIVE)))
def test_results_and_gradients_in_the_inputs_own_dtype(case):
    floating = conformance.call_of(case.op, case.spec).arrays.floating.values()
    if case.implementation != "reference" and all(array.dtype == jnp.float32 for array in floating):
        pytest.skip("float32, as above")
    with run_where_it_can(case):
        conformance.check(case, None, SEED)


def is_quick_interpreted(case) -> bool:
    """Of an op's quick calls a TPU's kernel takes the first, which is awkward; a GPU's refuses all but one or two."""
    return case in first_of_each(FOR_INTERPRETERS) or (case.quick and case.home.platform == "gpu")


@pytest.mark.parametrize("case", chosen((case for case in FOR_INTERPRETERS if case.small), is_quick_interpreted))
def test_results_and_gradients_interpreted(case):
    with run_where_it_can(case):
        conformance.check(case, dtype_of(case), SEED)


@pytest.mark.parametrize("case", chosen(first_of_each(NATIVE)))
def test_forward_mode_derivatives_are_right_or_refused(case):
    with run_where_it_can(case):
        conformance.check_jvp(case, SEED)


@pytest.mark.parametrize(
    "case",
    chosen(
        (case for case in NATIVE if case.quick and case.implementation != "reference"),
        lambda case: case in first_of_each(NATIVE),
    ),
)
def test_under_vmap(case):
    with run_where_it_can(case):
        conformance.check_vmap(case, "float32", SEED)


@pytest.mark.slow
@pytest.mark.parametrize("case", chosen(filter(is_quick, FOR_INTERPRETERS)))
def test_under_vmap_interpreted(case):
    with run_where_it_can(case):
        conformance.check_vmap(case, dtype_of(case), SEED)


def has_an_even_axis(case) -> bool:
    arrays = jax.tree.leaves(conformance.call_of(case.op, case.spec).arrays)
    return any(size % 2 == 0 for array in arrays for size in array.shape)


@pytest.mark.parametrize("case", chosen(case for case in NATIVE if case.quick and case.implementation != "reference"))
def test_on_two_devices(case):
    if not has_an_even_axis(case):
        pytest.skip("has no even axis")
    with run_where_it_can(case):
        conformance.check_sharded(case, "float32", SEED)


@pytest.mark.parametrize("case", chosen(case for case in FOR_INTERPRETERS if case.quick or not case.small))
def test_lowers_for_its_device(case):
    device = H100 if case.home.platform == "gpu" else TPU
    try:
        lowered = conformance.lowered(case, device)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert case.home.in_program in lowered.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "case",
    chosen(
        (case for case in NATIVE if case.implementation == "xla" and not case.small),
        lambda case: case.spec == specs(case.op.__name__, ["speed"])[0],
    ),
)
def test_xla_lowers_for_every_device(case, platform):
    conformance.lowered(case, H100 if platform == "cuda" else TPU)


def refusal(case) -> str:
    with run_where_it_can(case):
        try:
            conformance.widest_served(case)
        except NotImplementedError as reason:
            return str(reason)
    return ""


@pytest.mark.parametrize("name", OPS)
def test_each_implementation_serves_a_small_call_at_home(name):
    """Or it would never be compared with anything; one that serves no call at all says so."""
    for implementation in OPS[name].implementations:
        assert implementation in HOMES, f"say in conformance.HOMES where {implementation} runs"
        if HOMES[implementation].platform is not None and HOMES[implementation].stand_in is None:
            continue  # seen on the device alone
        if implementation == "triton" and not importlib.util.find_spec("triton"):
            continue
        calls = [case for spec in specs(name) if (case := Case(OPS[name], implementation, spec)).small]
        for case in sorted(calls, key=is_quick, reverse=True):
            reason = refusal(case)
            if not reason or f"{implementation}: has no kernel" in reason:
                break
        else:
            pytest.fail(f"{name} by {implementation} serves no small spec, so add one to its specs.py: {reason}")


def test_each_op_has_a_quick_call_that_two_devices_can_split():
    for name in OPS:
        quick = cases("quick", ops={name: OPS[name]}, platforms=[None])
        assert any(map(has_an_even_axis, quick)), f"{name} needs a spec with the tag quick, of even sizes"


def right(x, axis, scale, soft_cap, mask):
    from crescendo.pallas_kernels.softmax import reference

    return reference.softmax(x, axis=axis, scale=scale, soft_cap=soft_cap, mask=mask)


def wrong_result(x, **options):
    return right(x, **options) * (1 + 1e-3)


def wrong_dtype(x, **options):
    return right(x.astype(jnp.float32), **options)


def wrong_gradient(x, **options):
    y = right(x, **options)
    return y + (right(1.001 * x, **options) - jax.lax.stop_gradient(right(1.001 * x, **options)))


def no_result_in_one_place(x, **options):
    return right(x, **options).at[..., -1].set(jnp.nan)


def wrong_under_vmap(x, **options):
    nothing = jax.custom_batching.custom_vmap(lambda x: jnp.zeros_like(x))
    nothing.def_vmap(lambda size, batched, x: (jnp.full_like(x, 1e-3), True))
    return right(x, **options) + nothing(jax.lax.stop_gradient(x))


MISTAKES = {
    "result": (wrong_result, functools.partial(conformance.check, dtype="float32")),
    "dtype": (wrong_dtype, functools.partial(conformance.check, dtype=None)),
    "gradient": (wrong_gradient, functools.partial(conformance.check, dtype="float32")),
    "nan": (no_result_in_one_place, functools.partial(conformance.check, dtype="float32")),
    "vmap": (wrong_under_vmap, functools.partial(conformance.check_vmap, dtype="float32")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_made_up_implementation_that_is_wrong_is_found(mistake, monkeypatch):
    function, check = MISTAKES[mistake]
    module = types.ModuleType("made_up_xla")
    module.softmax = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made_up = op({"xla": "made_up_xla", "reference": softmax.implementations["reference"]})(softmax.check)
    (case,) = (
        case
        for case in cases("quick", ops={"softmax": made_up}, platforms=[None])
        if case.implementation == "xla" and case.spec.name == "one row"
    )
    with pytest.raises(AssertionError, match="softmax-xla-one row: "):
        check(case, seed=SEED)
    module.softmax = right
    check(case, seed=SEED)

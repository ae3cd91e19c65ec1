"""From an op to the launch of a kernel: how many calls there are, and that `jax.shard_map` may check the way."""

import functools
import importlib.util
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from crescendo import pallas_kernels
from crescendo.pallas_kernels import (
    attention,
    grouped_matmul,
    layer_norm,
    linear_cross_entropy,
    qk_norm_rotary,
    rms_norm,
    softmax,
    swiglu,
)
from crescendo.pallas_kernels.op import target

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, SHARED = PartitionSpec("data"), PartitionSpec()
DEVICES = {
    "mosaic_gpu": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "mosaic_tpu": AbstractDevice("TPU v5e", 1, "tpu"),
}
DEVICES["triton"] = DEVICES["split_keys"] = DEVICES["mosaic_gpu"]
HERE = Path(pallas_kernels.__file__).resolve().parent


def norm(x, residual, scale, probe, **options):
    return rms_norm(x, scale, eps=1e-5, residual=residual, probe=probe, **options)


def loss(x, w, weights, **options):
    labels = jnp.arange(x.shape[0]) % 4  # the same for the rows of either device
    return linear_cross_entropy(x, w, labels, weights=weights, return_lse=True, **options)


def attend(q, k, v, bias, **options):
    return attention(q, k, v, causal=True, bias=bias, return_lse=True, **options)


def packed(q, k, v, **options):
    return attention(q, k, v, causal=True, segment_ids=(q[..., 0, 0] > 0).astype(jnp.int32), **options)


def begun(q, k, v, **options):
    return attention(q, k, v, causal=True, positions=(q[0, 0, 0, 0] > 0).astype(jnp.int32), **options)


def grouped(x, w, **options):
    return grouped_matmul(x, w, jnp.array([0, x.shape[0], 0]), **options)  # each device's rows in one group


# A function of an op, its arrays' shapes, None for an argument that isn't there, and where a mesh has them.
CALLS = {
    "attention": (attend, ((4, 96, 4, 64), *[(4, 96, 2, 64)] * 2, None), (ROWS,) * 4, attention),
    "packed": (packed, ((4, 96, 4, 64), *[(4, 96, 2, 64)] * 2), (ROWS,) * 3, attention),
    "begun": (begun, ((4, 6, 4, 64), *[(4, 96, 2, 64)] * 2), (ROWS,) * 3, attention),
    "scores kept": (attend, ((2, 256, 2, 128),) * 3 + (None,), (ROWS,) * 4, attention),
    "bias": (attend, ((4, 96, 4, 64), *[(4, 96, 2, 64)] * 2, (1, 4, 96, 96)), (*(ROWS,) * 3, SHARED), attention),
    "rms_norm": (norm, ((4, 6, 256), None, (256,), None), (ROWS, ROWS, SHARED, ROWS), rms_norm),
    "residual": (norm, ((4, 6, 256), (4, 6, 256), (256,), (4,)), (ROWS, ROWS, SHARED, ROWS), rms_norm),
    "rotary": (
        functools.partial(qk_norm_rotary, eps=1e-5),
        ((4, 6, 2, 16), (4, 6, 1, 16), (16,), (16,), (4, 6, 8), (1, 6, 8)),
        (ROWS, ROWS, SHARED, SHARED, ROWS, SHARED),
        qk_norm_rotary,
    ),
    "layer_norm": (
        functools.partial(layer_norm, eps=1e-5),
        ((4, 6, 256), (256,), (256,)),
        (ROWS, SHARED, SHARED),
        layer_norm,
    ),
    "grouped": (grouped, ((256, 128), (3, 128, 128)), (ROWS, SHARED), grouped_matmul),
    "softmax": (softmax, ((4, 512),), (ROWS,), softmax),
    "swiglu": (swiglu, ((4, 256),) * 2, (ROWS, ROWS), swiglu),
    "side by side": (swiglu, ((4, 2, 256),), (ROWS,), swiglu),
    "loss": (loss, ((8, 256), (128, 256), (8,)), (ROWS, SHARED, ROWS), linear_cross_entropy),
}


# Calls of their own for XLA too; what reads numbers of segments or positions differs in kernels alone.
COMPARED = [name for name in CALLS if name not in ("scores kept", "packed", "begun")]
# What has no kernel: a bias for Hopper, and rotation for a TPU.
REFUSED = {("bias", "mosaic_gpu"), ("bias", "split_keys"), ("rotary", "mosaic_tpu")}
NEEDS_TRITON = pytest.mark.skipif(not importlib.util.find_spec("jax_triton"), reason="needs Triton")
KERNELS = [
    pytest.param(
        name, kernel, id=f"{name} {kernel}", marks=(pytest.mark.aot, NEEDS_TRITON) if kernel == "triton" else ()
    )
    for name, (*_, op) in CALLS.items()
    for kernel in DEVICES
    if kernel in op.implementations and (name, kernel) not in REFUSED
]


def gradient_of_a_sum(call, implementation, *arrays):
    """The sum of all results, arrays by their sines, and its gradients."""

    def total(*arrays):
        results = [y.astype(jnp.float32) for y in jax.tree.leaves(call(*arrays, implementation=implementation))]
        return sum(jnp.sum(jnp.sin(y)) if y.ndim else y for y in results)

    given = tuple(i for i, array in enumerate(arrays) if array is not None)
    return jax.value_and_grad(total, given)(*arrays)


def dtype_of(shape):
    return jnp.bfloat16 if math.prod(shape) > 512 else jnp.float32


def trace(function, implementation: str, call, shapes, places):
    """Traces the function of a call for a device of a checked mesh of two; large arrays are bfloat16."""
    device = DEVICES[implementation]
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    arrays = [shape and jax.ShapeDtypeStruct(shape, dtype_of(shape)) for shape in shapes]

    def part(*arrays):
        results = jax.tree.leaves(function(call, implementation, *arrays))
        return sum(jax.lax.psum(jnp.sum(y.astype(jnp.float32)), "data") for y in results)

    run = jax.shard_map(part, mesh=mesh, in_specs=tuple(places), out_specs=SHARED)
    with target(device), jax.sharding.use_abstract_mesh(mesh):
        jax.jit(run).trace(*arrays)


@pytest.fixture
def ways(monkeypatch):
    """Of each launch of a kernel who launches, and our own functions between whoever called the op and that one."""
    found: list[tuple[str, list[str]]] = []

    def spied(launcher, launch):
        @functools.wraps(launch)
        def launching(*args, **kwargs):
            ours = [frame for frame in inspect.stack(0) if HERE in Path(frame.filename).resolve().parents]
            found.append((launcher, [f"{Path(frame.filename).stem}.{frame.function}" for frame in ours][:0:-1]))
            return launch(*args, **kwargs)

        return launching

    monkeypatch.setattr(pl, "pallas_call", spied("mosaic_tpu", pl.pallas_call))
    monkeypatch.setattr(plgpu, "kernel", spied("mosaic_gpu", plgpu.kernel))
    if importlib.util.find_spec("jax_triton"):
        module = importlib.import_module("jax_triton")
        monkeypatch.setattr(module, "triton_call", spied("triton", module.triton_call))
    return found


def without_gradient(call, implementation, *arrays):
    return call(*arrays, implementation=implementation)


@pytest.mark.parametrize(("name", "implementation"), KERNELS)
@pytest.mark.parametrize("function", [without_gradient, gradient_of_a_sum], ids=["forward", "gradient"])
def test_six_calls_to_a_kernel_of_its_own_also_where_a_mesh_is_checked(name, implementation, function, ways):
    call, shapes, places, _ = CALLS[name]
    trace(function, implementation, call, shapes, places)
    written_in = "mosaic_gpu" if implementation == "split_keys" else implementation
    assert {launcher for launcher, _ in ways} == {written_in}  # none has another's gradient
    for _, way in ways:
        # A loss that is too large for the quick pass is worked on again, in a loop around what the quick pass does.
        again = max(0, way.count("chunked._over_chunks") - 1)
        assert 2 <= len(way) <= 6 + 2 * again, way


# The reference is JAX's own operations, whose way through a checked mesh is JAX's.
@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPARED)
def test_a_checked_mesh_changes_neither_results_nor_gradients(name, implementation):
    """Gradients are taken inside: those of an array that devices share are sums over them, and say so."""
    call, shapes, places, _ = CALLS[name]
    arrays = drawn(shapes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    of_gradients = tuple(place for place, array in zip(places, arrays, strict=True) if array is not None)

    def part(*arrays):
        total, gradients = gradient_of_a_sum(call, implementation, *arrays)
        return jax.lax.psum(total, "data"), gradients

    run = jax.shard_map(part, mesh=mesh, in_specs=tuple(places), out_specs=(SHARED, of_gradients))
    found = jax.jit(run)(*arrays)
    assert_right(found, call, arrays)


@pytest.mark.parametrize("name", COMPARED)
def test_an_explicit_mesh_changes_neither_results_nor_gradients(name):
    """Gradients are laid out as the arrays they are of, which JAX asks for."""
    call, shapes, places, _ = CALLS[name]
    arrays = drawn(shapes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        given = [
            None if array is None else jax.device_put(array, NamedSharding(mesh, place))
            for array, place in zip(arrays, places, strict=True)
        ]
        found = jax.device_get(jax.jit(functools.partial(gradient_of_a_sum, call, "xla"))(*given))
    assert_right(found, call, arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), KERNELS)
def test_kernels_and_their_gradients_under_an_explicit_mesh(name, implementation):
    call, shapes, places, _ = CALLS[name]
    device = DEVICES[implementation]
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,), abstract_device=device)
    arrays = [
        shape and jax.ShapeDtypeStruct(shape, dtype_of(shape), sharding=NamedSharding(mesh, place))
        for shape, place in zip(shapes, places, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        _, gradients = jax.eval_shape(functools.partial(gradient_of_a_sum, call, implementation), *arrays)
    given = [array for array in arrays if array is not None]
    assert [spec_of(gradient) for gradient in gradients] == [spec_of(array) for array in given]


def spec_of(array):
    """Of every dimension."""
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def drawn(shapes):
    random = np.random.default_rng()
    return [None if shape is None else jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@functools.cache
def reference_of(call):
    """`gradient_of_a_sum` of the reference, compiled once for all who are compared with it."""
    return jax.jit(functools.partial(gradient_of_a_sum, call, "reference"))


def assert_right(found, call, arrays):
    """Of `gradient_of_a_sum`: the reference's on one device."""
    for ours, right in zip(jax.tree.leaves(found), jax.tree.leaves(reference_of(call)(*arrays)), strict=True):
        # Both round sums of float32, in another order. The total is that of up to 98,304 sines of either sign, and may
        # be near 0: up to 1.1e-4 off in 1,000 draws.
        most = 1e-4 if ours.ndim else 1e-3
        assert jnp.linalg.norm((ours - right).ravel()) <= most * max(1.0, jnp.linalg.norm(right.ravel()))

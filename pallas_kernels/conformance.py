"""What every implementation of every op is held to: the reference's results and derivatives, wherever it runs.

Ops and implementations are those of `OPS`, and calls those of `OP/specs.py`: a new one is tested by existing. A case is
run natively, in an interpreter (`interpreter`), or compiled for a device that is not there, by its implementation's
`HOMES`::

    for case in cases("quick", platforms=["tpu"]):
        with interpreted(case.home.stand_in):
            check(case)

Everything that is floating in a call is differentiated, for random cotangents. "Exact" is the reference in float64 of
the same numbers.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crescendo.pallas_kernels import OPS
from crescendo.pallas_kernels.bench import module, specs
from crescendo.pallas_kernels.op import Spec, target

# By the narrowest dtype of the inputs, of the norm: float32 sums in another order; float16 keeps 11 bits and bfloat16
# 8, and what lies between a kernel's matmuls is rounded as the results are: each such step costs 2e-3 in bfloat16.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Entries of this size in the mean count as that large: below, both sides are rounding (where one key is seen, the
# gradient of q is).
LEAST = 1e-3


@dataclasses.dataclass(frozen=True)
class Home:
    """Where the kernels of an implementation run.

    Attributes:
      platform: "gpu" or "tpu"; None: anywhere, compiled by XLA.
      stand_in: the device for an interpreter; None where there is none.
      in_program: what a compiled program says where such a kernel is called.
    """

    platform: str | None = None
    stand_in: AbstractDevice | None = None
    in_program: str = ""


# Few cores, so that a block of threads takes several tiles.
HOPPER = Home("gpu", AbstractDevice("NVIDIA H100 80GB HBM3", 2, "gpu"), "mosaic_gpu")
# An implementation's name is its language, or what it does.
HOMES = {
    "mosaic_gpu": HOPPER,
    "split_keys": HOPPER,
    # One: its interpreter runs a program to its end, which must not wait for another.
    "triton": Home("gpu", AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu"), "triton_kernel_call"),
    "cudnn": Home("gpu", None, "__cudnn"),
    "mosaic_tpu": Home("tpu", AbstractDevice("TPU v5e", 1, "tpu"), "tpu_custom_call"),
    "looped": Home(),
    "xla": Home(),
    "merged": Home(),
    "reference": Home(),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an implementation."""

    op: Callable
    implementation: str
    spec: Spec

    @property
    def home(self) -> Home:
        return HOMES[self.implementation]

    @property
    def quick(self) -> bool:
        return "quick" in self.spec.tags

    @property
    def small(self) -> bool:
        """Whether the reference can be computed in float64, on the host."""
        return bool(self.spec.tags & {"small", "awkward"}) and "real" not in self.spec.tags

    def __str__(self) -> str:
        return f"{self.op.__name__}-{self.implementation}-{self.spec.name}"


def cases(
    *tags: str, platforms: Iterable[str | None] = (None, "gpu", "tpu"), ops: Mapping[str, Callable] = OPS
) -> Iterator[Case]:
    """Every implementation at home on one of the platforms, on every spec that carries one of the tags (default all).

    >>> found = {str(case) for case in cases("quick", platforms=["tpu"])}
    >>> "softmax-mosaic_tpu-capped" in found, any("mosaic_gpu" in name for name in found)
    (True, False)
    """
    for name, op in ops.items():
        for implementation in op.implementations:  # type: ignore[attr-defined]
            for spec in specs(name):
                case = Case(op, implementation, spec)
                if case.home.platform in platforms and (not tags or spec.tags & set(tags)):
                    yield case


def fine_tiles(op: Callable) -> dict[tuple[str, str], dict[str, Any]]:
    """What `tiles.cut` takes, so that small calls have several tiles: `FINE` of the folder's specs, and of all rows."""
    name = op.__name__
    of_op = module(name, "specs")
    folder = of_op.__name__.split(".")[-2]
    own = {(folder, kernel): fields for kernel, fields in getattr(of_op, "FINE", {}).items()}
    return own | {("hopper", "rows"): {"blocks": 1, "piece": 512}, ("tpu_rows", "blocks"): {"entries": 1}}


class Arrays(NamedTuple):
    """A call's arrays by name: what is differentiated, and the others."""

    floating: dict[str, Any]
    others: dict[str, Any]


class Call(NamedTuple):
    """A call apart: its arrays, and `rebuild(arrays) -> (arguments, keyword arguments)`."""

    arrays: Arrays
    rebuild: Callable[[Arrays], tuple[tuple, dict]]


def call_of(op: Callable, spec: Spec, seed: int | None = None, dtype: str | None = None) -> Call:
    """The spec's call on random inputs, or on shapes where `seed` is None; arrays by the names of the op's arguments.

    `dtype`: of all floating arrays; float16 in the place of bfloat16 alone; None: their own.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(spec.abstract() if seed is None else spec.inputs(seed))
    arguments = list(inspect.signature(op).parameters)
    names = []
    for (side, first, *rest), _ in leaves:
        name = arguments[first.idx] if side.idx == 0 else first.key
        names.append(name + "".join(map(str, rest)))
    arrays = Arrays({}, {})
    constants = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            constants[name] = leaf
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            arrays.others[name] = leaf
        else:
            arrays.floating[name] = _cast(leaf, dtype)

    def rebuild(arrays: Arrays) -> tuple[tuple, dict]:
        values = {**constants, **arrays.floating, **arrays.others}
        return jax.tree.unflatten(structure, [values[name] for name in names])

    return Call(arrays, rebuild)


def _cast(array, dtype: str | None):
    if dtype is None or (dtype == "float16" and array.dtype != jnp.bfloat16):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.dtype(dtype))
    return array.astype(dtype)


def everything(op: Callable, implementation: str, rebuild: Callable) -> Callable[..., dict[str, Any]]:
    """`(arrays, cotangents) -> results and gradients`, by what they are of."""

    def run(arrays: Arrays, cotangents: Sequence) -> dict[str, Any]:
        def of(floating):
            arguments, options = rebuild(Arrays(floating, arrays.others))
            return jax.tree.leaves(op(*arguments, **options, implementation=implementation))

        results, back = jax.vjp(of, arrays.floating)
        (gradients,) = back([c.astype(y.dtype) for c, y in zip(cotangents, results, strict=True)])
        found = {f"result {i}": y for i, y in enumerate(results)}
        return found | {f"gradient of {name}": gradient for name, gradient in gradients.items()}

    return run


def result_shapes(op: Callable, call: Call) -> list[jax.ShapeDtypeStruct]:
    """Of the op's results, in a list."""

    def of(arrays):
        arguments, options = call.rebuild(arrays)
        return jax.tree.leaves(op(*arguments, **options, implementation="reference"))

    return jax.eval_shape(of, call.arrays)


def cotangents_for(op: Callable, call: Call, seed: int) -> list[jax.Array]:
    """Random, float32, exact in bfloat16; of scalars not near 0."""
    shapes = result_shapes(op, call)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(shapes))
    draw = lambda key, y: jax.random.normal(key, y.shape) if y.shape else 1 + jax.random.uniform(key)  # noqa: E731
    drawn = (draw(key, y).astype(jnp.bfloat16) for key, y in zip(keys, shapes, strict=True))
    return [cotangent.astype(jnp.float32) for cotangent in drawn]


@functools.lru_cache(maxsize=32)
def exactly(op: Callable, spec: Spec, seed: int, dtype: str | None) -> dict[str, np.ndarray]:
    """`in_float64` of a case's inputs of that dtype, and its cotangents."""
    call = call_of(op, spec, seed, dtype)
    return in_float64(op, call, cotangents_for(op, call, seed))


def in_float64(op: Callable, call: Call, cotangents: Sequence[jax.Array]) -> dict[str, np.ndarray]:
    """`everything` of the reference, on the host."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)  # noqa: E731
        arrays = Arrays(*jax.tree.map(lambda a: wide(a) if _is_floating(a) else np.asarray(a), tuple(call.arrays)))
        run = jax.jit(everything(op, "reference", call.rebuild))
        return jax.tree.map(np.asarray, run(arrays, [wide(c) for c in cotangents]))


def _is_floating(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def error(found, exact, xp: Any = np):
    """The norm of the difference to that of the exact array; NaN where not the same entries are finite.

    In float64 on the host, or in float32 where `xp` is `jax.numpy`.
    """
    wide = np.float64 if xp is np else jnp.float32
    found, exact = xp.asarray(found).astype(wide), xp.asarray(exact).astype(wide)
    finite = xp.isfinite(exact)
    agree = xp.all(xp.where(finite, xp.isfinite(found), found == exact))
    size = lambda a: xp.sqrt(xp.sum(xp.where(finite, a, 0) ** 2))  # noqa: E731
    apart = size(xp.where(finite & xp.isfinite(found), found, 0) - xp.where(finite, exact, 0))
    return xp.where(agree, apart / xp.maximum(size(exact), LEAST * max(exact.size, 1) ** 0.5), xp.nan)


def tolerance(spec: Spec, arrays: Arrays) -> float:
    """Of a call with these arrays."""
    narrowest = min((a.dtype for a in arrays.floating.values()), key=lambda dtype: jnp.finfo(dtype).nmant)
    return TOLERANCE[str(narrowest)] * spec.slack


def refusal(op: Callable, implementation: str, call: Call) -> str:
    """Why an implementation that is asked by name doesn't serve a call on the target device, or nothing."""

    def of(arrays):
        arguments, options = call.rebuild(arrays)
        return op(*arguments, **options, implementation=implementation)

    try:
        jax.eval_shape(of, call.arrays)
    except NotImplementedError as reason:
        if not str(reason).startswith(f"{op.__name__} on "):
            raise
        return str(reason)
    return ""


def widest_served(case: Case) -> str | None:
    """The dtype that tells errors apart best: float32, else float16, else the spec's own (None).

    Raises:
      NotImplementedError: the implementation takes none of them.
    """
    for dtype in ("float32", "float16", None):
        reason = refusal(case.op, case.implementation, call_of(case.op, case.spec, None, dtype))
        if not reason:
            return dtype
    raise NotImplementedError(reason)


def compare(case: Case, found: Mapping[str, Any], exact: Mapping[str, Any], call: Call) -> None:
    """Raises AssertionError, with all errors, unless they are within the tolerance and of the reference's types.

    On the host, or where the exact results are.
    """
    on_host = all(isinstance(array, np.ndarray) for array in exact.values())
    measure = error if on_host else _error_on_device
    narrow = lambda f: np.asarray(f.astype(jnp.float32)) if on_host else f  # noqa: E731
    types = {f"result {i}": y for i, y in enumerate(result_shapes(case.op, call))}
    types |= {f"gradient of {name}": array for name, array in call.arrays.floating.items()}
    shown = lambda arrays: {name: (str(a.dtype), a.shape) for name, a in arrays.items()}  # noqa: E731
    assert shown(found) == shown(types), f"{case}: {shown(found)}, not {shown(types)}"
    errors = {name: float(measure(narrow(f), exact[name])) for name, f in found.items()}
    most = tolerance(case.spec, call.arrays)
    wrong = {name: value for name, value in errors.items() if not value <= most}  # which no NaN is
    assert not wrong, f"{case}: beyond {most:.1e}: {wrong}; of {errors}"


_error_on_device = jax.jit(functools.partial(error, xp=jnp))


def check(case: Case, dtype: str | None = None, seed: int = 0) -> None:
    """Results and gradients."""
    call = call_of(case.op, case.spec, seed, dtype)
    cotangents = cotangents_for(case.op, call, seed)
    found = jax.jit(everything(case.op, case.implementation, call.rebuild))(call.arrays, cotangents)
    compare(case, jax.tree.map(np.asarray, found), exactly(case.op, case.spec, seed, dtype), call)


def check_vmap(case: Case, dtype: str | None = None, seed: int = 0) -> None:
    """Two calls that `jax.vmap` makes of one: the results and gradients of each."""
    calls = [call_of(case.op, case.spec, seed + i, dtype) for i in range(2)]
    given = [(call.arrays, cotangents_for(case.op, call, seed + i)) for i, call in enumerate(calls)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *given)
    found = jax.jit(jax.vmap(everything(case.op, case.implementation, calls[0].rebuild)))(*stacked)
    for i, call in enumerate(calls):
        own = {name: np.asarray(array[i]) for name, array in found.items()}
        compare(case, own, exactly(case.op, case.spec, seed + i, dtype), call)


def check_jvp(case: Case, seed: int = 0) -> None:
    """Forward-mode derivatives are the transposed gradients, or are refused with the name of who has them."""
    call = call_of(case.op, case.spec, seed, "float32")
    cotangents = cotangents_for(case.op, call, seed)
    random = np.random.default_rng(seed)
    tangents = {name: jnp.asarray(random.normal(size=a.shape), jnp.float32) for name, a in call.arrays.floating.items()}

    def of(floating):
        arguments, options = call.rebuild(Arrays(floating, call.arrays.others))
        return jax.tree.leaves(case.op(*arguments, **options, implementation=case.implementation))

    refused = ""
    try:
        # Around a `jax.jit` JAX would word the refusal.
        run = jax.jit(of) if case.implementation == "reference" else of
        _, pushed = jax.jvp(run, (call.arrays.floating,), (tangents,))
    except TypeError as error:
        refused = str(error)
    if refused:
        said = f"{case.op.__name__} by {case.implementation} has no forward-mode derivative"
        assert case.implementation != "reference", f"{case}: {refused}"
        assert said in refused, f"{case}: {refused}"
        assert "implementation='reference'" in refused, f"{case}: {refused}"
        return
    exact = exactly(case.op, case.spec, seed, "float32")
    forward = [c * t for c, t in zip(cotangents, pushed, strict=True)]
    backward = [tangents[name] * exact[f"gradient of {name}"] for name in tangents]
    sums = [sum(float(np.sum(np.asarray(term, np.float64))) for term in terms) for terms in (forward, backward)]
    most = TOLERANCE["float32"] * case.spec.slack * float(np.sqrt(sum(np.sum(np.square(term)) for term in backward)))
    assert abs(sums[0] - sums[1]) <= 10 * most, f"{case}: jvp gives {sums[0]}, and the gradients {sums[1]}"


def check_sharded(case: Case, dtype: str | None = None, seed: int = 0) -> None:
    """On two devices, each array split along its first even axis: the results and gradients of one device."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    call = call_of(case.op, case.spec, seed, dtype)

    def place(array):
        even = next((i for i, size in enumerate(array.shape) if size and size % 2 == 0), None)
        return NamedSharding(mesh, P() if even is None else P(*[None] * even, "x"))

    given = call.arrays, cotangents_for(case.op, call, seed)
    run = jax.jit(everything(case.op, case.implementation, call.rebuild))
    found = run(*jax.device_put(given, jax.tree.map(place, given)))
    compare(case, jax.tree.map(np.asarray, found), exactly(case.op, case.spec, seed, dtype), call)


def compiled(op: Callable, implementation: str, spec: Spec, dtype: str | None = None) -> jax.stages.Compiled:
    """`everything` for the device at hand, on inputs of that dtype; in float32 by matmuls that are exact."""
    call = call_of(op, spec, None, dtype)
    like = [jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in result_shapes(op, call)]
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        return jax.jit(everything(op, implementation, call.rebuild)).lower(call.arrays, like).compile()


def lowered(case: Case, device: Any) -> jax.stages.Lowered:
    """The case's program for a device that is not there: an `AbstractDevice`, or one of a topology to compile for."""
    call = call_of(case.op, case.spec)
    like = [jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in result_shapes(case.op, call)]
    run, given = everything(case.op, case.implementation, call.rebuild), (call.arrays, like)
    platform = "tpu" if device.platform == "tpu" else "gpu"
    mesh: Any
    if isinstance(device, AbstractDevice):
        mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    else:
        mesh, where = Mesh(np.array([device]), ("x",)), P()
        place = NamedSharding(mesh, where)
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), given)
    if platform == "tpu":  # whose kernels XLA doesn't split
        run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.sharding.use_abstract_mesh(mesh) if isinstance(device, AbstractDevice) else target(device):
        traced = jax.jit(run).trace(*given)
        return traced.lower(lowering_platforms=("tpu" if platform == "tpu" else "cuda",))

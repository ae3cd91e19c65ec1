"""One op, many implementations: what a kernel package declares, and how a call finds who serves it.

An op is a function decorated with `@op({name: module, ...})`, implementations in order of preference. Its body is the
contract: it checks the arguments (`ValueError`, `TypeError`), fills in defaults and returns the keyword arguments that
every implementation takes. An implementation is the function of the op's name in its module, imported on first use:
it either returns the result, or `Kernels`, of which the op makes it (`run`), or raises `Unsupported` (a
`NotImplementedError`) with one line that says why, while it is being traced and before it computes anything. With
`implementation=None` the next one is then asked; one that was asked for by name, or several, fail loudly. Any other
error is a mistake, and is never taken for an answer::

    @op({"mosaic_gpu": "crescendo.pallas_kernels.softmax.mosaic_gpu", "reference": "..."})
    def softmax(x, *, axis=-1):
        '''Docstring with the maths, shapes, dtypes, errors, an example, the source.'''
        ...checks...
        return {"x": x, "axis": axis % x.ndim}

    softmax(x)                                # the first that serves
    softmax(x, implementation="mosaic_gpu")   # this one, or an error
    print(explain(softmax, x))                # each one's answer

**Device.** Implementations ask `target_device()`, at trace time: the abstract mesh's device if there is one (inside
`jax.set_mesh` and inside `target(device)`, which is how a program is traced for a device that is not there), else the
default device. It is part of JAX's own trace context, so cached traces for different devices never mix.

**Derivatives.** Every op has the reverse-mode one. Its rule stands once, in `run`, and kernels bring both passes: none
has another's gradient. Second and forward-mode ones (`jax.jvp`) are sure to be there with
`implementation="reference"` only; what hasn't them says so. (Under or around a `jax.jit` the lack of a forward-mode one
is told by JAX, which doesn't know what to pass.)

**Specs.** `OP/specs.py` holds `SPECS`, named calls of real and awkward shapes (`Spec`): the same ones drive the tests
(`crescendo.pallas_kernels.conformance`), the benchmark (`crescendo.pallas_kernels.bench`) and the tuning.

**Mesh.** A kernel that XLA can't partition is wrapped by `crescendo.pallas_kernels.sharded`, from the letters of its
dimensions and which of them are batch-like. Inside `jax.shard_map`, checked or not, an op sees a device's part.

**Calls.** From an op to the launch of a kernel there are at most six: the op, the rule of its derivative, `sharded`,
what cuts a part for the kernel, the pass. A test counts them.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# It brings a setting that belongs to every compiled function's key: imported on first use, in the middle of a trace, it
# would have the traced function compiled twice.
import jax.experimental.pallas.tpu
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

# Streaming multiprocessors and compute capability of GPUs that are known by name only (ahead of time).
GPUS = {"H100": (9.0, 132), "H200": (9.0, 132), "A100": (8.0, 108), "B200": (10.0, 148)}
# What the kind of a device begins with whose kernels run in an interpreter, here (`interpreter`).
INTERPRETED = "interpreted "


class Unsupported(NotImplementedError):  # noqa: N818  it is an answer, not a failure
    """An implementation's reason for not serving a call: one line."""


_asked_by_name = contextvars.ContextVar("asked_by_name", default=False)


_choices = contextvars.ContextVar[dict[str, list[str]] | None]("choices", default=None)


@contextlib.contextmanager
def choices() -> Iterator[dict[str, list[str]]]:
    """Collects which implementations serve the calls that are traced within, by the op's name.

    >>> from crescendo.pallas_kernels import softmax
    >>> with choices() as chosen:
    ...     _ = jax.eval_shape(lambda x: softmax(x), jax.ShapeDtypeStruct((2, 4), "float32"))
    >>> chosen
    {'softmax': ['xla']}
    """
    chosen: dict[str, list[str]] = {}
    token = _choices.set(chosen)
    try:
        yield chosen
    finally:
        _choices.reset(token)


def leave_to_others(reason: str) -> None:
    """Raises `Unsupported` unless this implementation was asked for by name: it would serve, but another is faster."""
    if not _asked_by_name.get():
        raise Unsupported(reason)


@dataclasses.dataclass(frozen=True)
class Device:
    """What an implementation may ask of the device it is traced for."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str
    compute_capability: float = 0.0  # of an NVIDIA GPU
    cores: int = 1  # streaming multiprocessors of a GPU

    @property
    def abstract(self) -> AbstractDevice:
        """What `target` takes."""
        return AbstractDevice(self.kind, self.cores, self.platform)

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run in an interpreter."""
        return self.kind.startswith(INTERPRETED)

    def __str__(self) -> str:
        return f"{self.kind} ({self.platform})"


def target_device() -> Device:
    """The device that the code being traced is for.

    >>> target_device().platform
    'cpu'
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    if platform != "gpu":
        return Device(platform, device.device_kind)
    known = next((entry for name, entry in GPUS.items() if name in device.device_kind), (0.0, 1))
    capability = float(getattr(device, "compute_capability", known[0]) or known[0])
    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None) or known[1]
    return Device(platform, device.device_kind, capability, cores)


@contextlib.contextmanager
def target(device: Any):
    """Traces for `device`, which need not be there: a device of a topology description, or an `AbstractDevice`.

    >>> with target(AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")):
    ...     print(target_device())
    NVIDIA H100 80GB HBM3 (gpu)
    """
    if not isinstance(device, AbstractDevice):
        platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
        device = AbstractDevice(device.device_kind, getattr(device, "core_count", None), platform)
    mesh = jax.sharding.get_abstract_mesh()
    mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def require_gpu(minimum: float, below: float = float("inf")) -> Device:
    """The target GPU, or `Unsupported` unless its compute capability is in `[minimum, below)`."""
    device = target_device()
    if device.platform != "gpu" or not minimum <= device.compute_capability < below:
        raise Unsupported(f"needs an NVIDIA GPU of compute capability {minimum} or later, not {device}")
    return device


def gradient_dtype(dtype: Any) -> Any:
    """In which gradients are multiplied by arrays of a dtype: its own, but for float16, whose range is too small.

    A gradient of a softmax over thousands, of a mean over thousands, is below float16's least number, 6e-8.

    >>> [str(gradient_dtype(np.dtype(name))) for name in ("float16", "float32")]
    ['float32', 'float32']
    """
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype)


def check_floating(**arrays: Any) -> None:
    """Raises TypeError for the first argument that is no array, or none of floating numbers.

    >>> check_floating(x=[1.0, 2.0])
    Traceback (most recent call last):
    ...
    TypeError: x is a list and must be an array: pass jnp.asarray(x)
    """
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{name} is a {type(array).__name__} and must be an array: pass jnp.asarray({name})")
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise TypeError(f"{name} is {array.dtype} and must be floating")


def check_number(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises TypeError for an argument that is no Python number, such as one that JAX traces; None may be `optional`.

    >>> check_number("eps", None)
    Traceback (most recent call last):
    ...
    TypeError: eps must be a Python number, not None: kernels are compiled for it
    """
    if (optional and value is None) or (isinstance(value, numbers.Real) and not isinstance(value, jax.core.Tracer)):
        return
    what = "a Python number or None" if optional else "a Python number"
    raise TypeError(f"{name} must be {what}, not {value!r}: kernels are compiled for it")


class SecondDerivativeError(NotImplementedError):
    """What has no second derivatives was asked for them."""


def once_differentiable(
    function: Callable[..., Any], called: str, advice: str = "pass implementation='reference', which has all"
) -> Callable[..., Any]:
    """A function of arrays inside of a derivative rule, which refuses to be differentiated by name.

    >>> square = once_differentiable(lambda x: x * x, "square", "multiply by hand")
    >>> jax.grad(square)(2.0)
    Traceback (most recent call last):
    ...
    crescendo.pallas_kernels.op.SecondDerivativeError: square has no second derivatives: multiply by hand
    """
    call = jax.custom_jvp(function)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise SecondDerivativeError(f"{called} has no second derivatives: {advice}")

    return call


@dataclasses.dataclass(frozen=True)
class Spec:
    """A named call of an op.

    Attributes:
      make: `key -> (arguments, keyword arguments)`: fresh random inputs; traced for shapes by `abstract`.
      flops: of the forward pass's matmuls, masked ones not counted, or 0.
      bytes: that the forward pass must move through device memory, or 0.
      differentiable: the names or positions of the arguments with gradients.
      tags: what the spec is for: "small" or "awkward" (compared with the reference in float64), "quick" (of those,
        the ones that take each kernel once through its branches), "scaled" (a real one made short), "real", "speed".
      backward_bytes: that the gradient must move besides, or 0 for one and a half times `bytes`.
      backward_flops: of the gradient's matmuls besides, or 0 for twice `flops`: a matmul has two derivatives of its
        size.
      slack: how many times as far as usual results may be from the exact ones (`conformance.TOLERANCE`).
    """

    name: str
    make: Callable[[jax.Array], tuple[tuple, dict]]
    flops: float = 0.0
    bytes: float = 0.0
    differentiable: tuple[int, ...] = (0,)
    tags: frozenset[str] = frozenset()
    backward_bytes: float = 0.0
    backward_flops: float = 0.0
    slack: float = 1.0

    def inputs(self, seed: int = 0) -> tuple[tuple, dict]:
        """Arrays on the default device."""
        return self.make(jax.random.key(seed))

    def abstract(self) -> tuple[tuple, dict]:
        """The same call with `jax.ShapeDtypeStruct`s in the place of arrays."""
        statics: list[Any] = []

        def arrays(key):
            leaves, structure = jax.tree.flatten(self.make(key))
            is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
            statics[:] = [structure, [None if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]]
            return [leaf if a else None for leaf, a in zip(leaves, is_array, strict=True)]

        shapes = jax.eval_shape(arrays, jax.random.key(0))
        structure, fixed = statics
        merged = [s if s is not None else f for s, f in zip(shapes, fixed, strict=True)]
        return jax.tree.unflatten(structure, merged)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one implementation says to a call: `reason` is empty where it serves."""

    implementation: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason or 'serves this call'}"


@dataclasses.dataclass(frozen=True)
class Answers:
    """Every implementation's answer, in order of preference."""

    op: str
    device: Device
    answers: tuple[Answer, ...]

    @property
    def chosen(self) -> str | None:
        return next((answer.implementation for answer in self.answers if not answer.reason), None)

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen or 'nobody serves this call'}"]
        return "\n".join([*lines, *(f"  {answer}" for answer in self.answers)])


class Kernels:
    """What an implementation may answer with: passes over arrays, of which the op makes a differentiable result."""


def op(
    implementations: Mapping[str, str], *, run: Callable[..., Any] | None = None, function: str | None = None
) -> Callable[[Callable[..., dict]], Callable[..., Any]]:
    """Makes an op of the function that checks its arguments; the module docstring tells the contract.

    Args:
      implementations: from name to module, in order of preference. The module's function of the op's name serves.
      run: `run(kernels, **arguments)` makes the result of an implementation's `Kernels`; None: they are the result.
      function: the name of the modules' function, where it isn't the op's.

    The result takes `implementation=None | name | (name, ...)` besides, and carries `implementations`.
    """

    def decorate(check: Callable[..., dict]) -> Callable[..., Any]:
        name = check.__name__

        @functools.wraps(check)
        def call(*args, implementation: str | Sequence[str] | None = None, **kwargs):
            arguments = check(*args, **kwargs)
            refusals = []
            for candidate in _names(name, implementations, implementation):
                token = _asked_by_name.set(implementation is not None)
                try:
                    with jax.named_scope(name):  # by which a profile knows whose a kernel is
                        result = load(call, candidate)(**arguments)
                        if run is not None and isinstance(result, Kernels):
                            result = run(result, **arguments)
                    _note_choice(name, candidate)
                    return result
                except Unsupported as reason:
                    refusals.append(Answer(candidate, str(reason)))
                except TypeError as error:
                    if "forward-mode" not in str(error):
                        raise
                    raise TypeError(
                        f"{name} by {candidate} has no forward-mode derivative (jax.jvp, jax.jacfwd): "
                        "pass implementation='reference', which has all"
                    ) from None
                finally:
                    _asked_by_name.reset(token)
            answers = _ask(call, args, kwargs)
            serving = [answer.implementation for answer in answers if not answer.reason]
            advice = f"implementation={' or '.join(map(repr, serving))} serves it" if serving else "none serves it"
            raise NotImplementedError(f"{name} on {target_device()}: {'; '.join(map(str, refusals))}; {advice}")

        signature = inspect.signature(check)
        extra = inspect.Parameter("implementation", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = list(signature.parameters.values())
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        call.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # type: ignore[attr-defined]
        call.implementations = dict(implementations)  # type: ignore[attr-defined]
        call.check = check  # type: ignore[attr-defined]
        call.run = run  # type: ignore[attr-defined]
        call.function = function or name  # type: ignore[attr-defined]
        return call

    return decorate


def _note_choice(name: str, implementation: str) -> None:
    chosen = _choices.get()
    if chosen is not None and implementation not in chosen.setdefault(name, []):
        chosen[name].append(implementation)


def explain(function: Callable[..., Any], *args, **kwargs) -> Answers:
    """Asks every implementation of the op `function` about a call, without computing anything.

    Arrays may be `jax.ShapeDtypeStruct`s. `explain(...).chosen` is the one that a plain call takes.
    """
    if not hasattr(function, "implementations"):
        raise TypeError(f"{function!r} is no op: pass one of crescendo.pallas_kernels")
    kwargs.pop("implementation", None)
    answers = _ask(function, args, kwargs)
    return Answers(function.__name__, target_device(), tuple(answers))


def _names(op_name: str, table: Mapping[str, str], implementation) -> tuple[str, ...]:
    """The implementations to ask, in order."""
    if implementation is None:
        return tuple(table)
    names = tuple(implementation) if isinstance(implementation, (tuple, list)) else (implementation,)
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(str(name), table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{op_name} has no implementation {name!r}{hint} There are {', '.join(table)}")
    if not names:
        raise ValueError(f"{op_name}: implementation=() names none; there are {', '.join(table)}")
    return names


def load(function: Any, implementation: str) -> Callable[..., Any]:
    """One implementation of an op; a missing optional package is a reason, not an error."""
    try:
        module = importlib.import_module(function.implementations[implementation])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("crescendo"):
            raise
        raise Unsupported(f"needs the package {error.name}, which is not installed") from None
    return getattr(module, function.function)


def _ask(function: Any, args: tuple, kwargs: dict) -> list[Answer]:
    """Every implementation's answer; only shapes are computed."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    dynamic = [isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in leaves]
    answers = []
    for name in function.implementations:

        def trace(arrays, name=name):
            given = iter(arrays)
            merged = [next(given) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, merged)
            arguments = function.check(*args, **kwargs)
            result = load(function, name)(**arguments)
            if isinstance(result, Kernels):
                result = None if function.run is None else function.run(result, **arguments)
            return result

        try:
            jax.eval_shape(trace, [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d])
            answers.append(Answer(name))
        except Unsupported as reason:
            answers.append(Answer(name, str(reason)))
    return answers

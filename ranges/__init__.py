"""The values that parameters take: a range stands at its parameter, as an annotation, is checked and shown from there.

>>> @checked
... def descend(rate: Positive, *, decay: Decay = 0.9, steps: Count | None = None) -> float:
...     return rate
>>> descend(0.5, decay=1.0)
Traceback (most recent call last):
  ...
ValueError: decay = 1.0 must be at least 0 and below 1: the default is 0.9
"""

import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

INT32 = Lt(2**31)
"""What the device's integers hold."""

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
"""Of a moving average."""
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), INT32]
"""Of examples, layers, steps: what the device counts."""
Start = Annotated[int, Ge(0), INT32]
"""On the clock of examples."""
Tokens = Annotated[int, Ge(1)]
"""Which the host counts alone, past 2^31 too."""
Seed = Annotated[int, Ge(0), INT32]


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """A value that is in a table, which may grow after the annotation was written.

    >>> fitted("b", Annotated[str, OneOf({"a": 1, "c": 2})])
    Traceback (most recent call last):
      ...
    crescendo.ranges.Refused: one of a, c
    """

    names: Collection[str]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A function, or a tree whose leaves are of some types: what stands where a mask does."""

    kinds: tuple[type, ...]

    def __str__(self) -> str:
        return f"a function, or a tree of {' and '.join(words(kind) for kind in self.kinds)}"


class Refused(Exception):  # noqa: N818
    """What a value must be instead, to stand behind "NAME = VALUE must be".

    Attributes:
      of_type: its type is wrong, and not its range.
    """

    def __init__(self, wanted: str, *, of_type: bool = False):
        super().__init__(wanted)
        self.of_type = of_type


_BOUNDS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Gt: ("gt", "above", operator.gt),
    Ge: ("ge", "at least", operator.ge),
    Lt: ("lt", "below", operator.lt),
    Le: ("le", "at most", operator.le),
    MultipleOf: ("multiple_of", "a multiple of", lambda x, y: x % y == 0),
}


_SEVERAL: dict[Any, Any] = {list: list, tuple: tuple, Sequence: (list, tuple)}


def fitted(value: Any, annotation: Any, is_a: Callable[[Any, Any], bool] | None = None, bounds: tuple = ()) -> Any:
    """The value, if it is in the range of its annotation; an int past 2^31 where a float is meant becomes one.

    An int of NumPy's or JAX' becomes Python's. Numbers are finite, unless the annotation has `Le(math.inf)`, and are
    judged as the device will have them: 1e-320 is 0. True is no number. Traced values pass.

    Args:
      value: of a parameter.
      annotation: the parameter's, with or without a range.
      is_a: whether a value is of a type that is neither a number nor made of others; None: types are the caller's own
        affair, and any will do.
      bounds: further ones.

    Raises:
      Refused: what it must be.

    >>> fitted(0.0, Decay), fitted(2**40, Positive), fitted([1, 2], Sequence[Count])
    (0.0, 1099511627776.0, [1, 2])
    >>> fitted([1, 0], Sequence[Count])
    Traceback (most recent call last):
      ...
    crescendo.ranges.Refused: each at least 1 and below 2^31
    """
    if isinstance(value, jax.core.Tracer):
        return value
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _within(fitted(value, inner[0], is_a, bounds + annotation.__metadata__), annotation, is_a)
    if origin in (Union, UnionType):
        return _one_of_several(value, inner, annotation, is_a, bounds)
    if origin is Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
        raise Refused(_choice(inner), of_type=type(value) not in map(type, inner))
    if annotation in (int, float):
        return _number(value, annotation, bounds)
    if origin in _SEVERAL and (isinstance(value, _SEVERAL[origin]) or (is_a is None and _is_array(value))):
        return _each(value, origin, inner, is_a, bounds)
    if origin in _SEVERAL and is_a is not None:  # a text, which is a sequence of texts, too
        raise Refused(words(annotation), of_type=True)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {_key(key, inner[0], is_a): _item(each, inner[1], is_a) for key, each in value.items()}
    if annotation in (Any, object, inspect.Parameter.empty):
        return value
    if is_a is None or (not (isinstance(value, bool) and annotation is not bool) and is_a(value, annotation)):
        return value
    raise Refused(words(annotation), of_type=True)


def _number(value: Any, kind: type, bounds: tuple) -> Any:
    """A number within bounds."""
    plain = value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0 else value
    if type(plain) not in (int, float) or (kind is int and type(plain) is float and math.isfinite(plain)):
        raise Refused(words(kind), of_type=True)
    if kind is int and type(plain) is float:
        raise Refused(_bounds_told(bounds, whole=True) or words(kind))
    if kind is float:
        if not any(isinstance(each, Lt | Le) for each in bounds):
            bounds = (*bounds, Lt(math.inf))
        if not any(isinstance(each, Gt | Ge) for each in bounds):
            bounds = (Gt(-math.inf), *bounds)
    seen = plain if kind is int else _on_device(plain)
    if not _inside(plain, bounds) or not _inside(seen, bounds):
        rounded = f" (as {_float_type().__name__} it is {seen:g})" if _inside(plain, bounds) else ""
        raise Refused(_bounds_told(bounds, whole=True) + rounded)
    if kind is float and type(plain) is int and not -(2**31) <= plain < 2**31:
        return float(plain)
    return plain if kind is int else value


def _inside(number: float, bounds: tuple) -> bool:
    """Whether a number is within bounds; NaN isn't within any."""
    known = [(each, *_BOUNDS[type(each)]) for each in bounds if type(each) in _BOUNDS]
    return all(holds(number, getattr(each, name)) for each, name, _, holds in known)


def _float_type() -> Any:
    return jax.dtypes.canonicalize_dtype(float).type


def _on_device(number: float) -> float:
    """As the device's float has it, whose smallest numbers are 0."""
    try:
        with np.errstate(over="ignore", under="ignore"):
            x = float(_float_type()(number))
    except OverflowError:
        return math.inf if number > 0 else -math.inf
    return 0.0 if abs(x) < float(np.finfo(_float_type()).tiny) else x


def _one_of_several(value: Any, kinds: tuple, annotation: Any, is_a: Any, bounds: tuple) -> Any:
    refused = []
    for kind in kinds:
        if is_a is None and not _may_be(value, kind):
            continue
        try:
            return fitted(value, kind, is_a, bounds)
        except Refused as error:
            refused.append(error)
    ranges = dict.fromkeys(str(error) for error in refused if not error.of_type)
    if ranges:
        raise Refused(" or ".join(ranges))
    if is_a is None and not _is_choice(annotation):
        return value
    raise Refused(words(annotation), of_type=True)


def _is_choice(annotation: Any) -> bool:
    """Whether all that there may be is written out."""
    if get_origin(annotation) in (Union, UnionType):
        return all(map(_is_choice, get_args(annotation)))
    return annotation is NoneType or get_origin(annotation) is Literal


def _may_be(value: Any, kind: Any) -> bool:
    """Whether a value may be meant to be of this kind, where types aren't checked."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(value, list | tuple) or _is_array(value):
        return get_origin(bare) in _SEVERAL
    if isinstance(value, dict):
        return get_origin(bare) in (dict, Mapping)
    named = any(isinstance(each, OneOf) for each in getattr(kind, "__metadata__", ()))
    return bare in (int, float) or get_origin(bare) is Literal or named


def _is_array(value: Any) -> bool:
    """Whether a value is what Python code may give in place of a list."""
    return isinstance(value, range) or (isinstance(value, np.ndarray | jax.Array) and value.ndim > 0)


def _each(value: Any, origin: Any, kinds: tuple, is_a: Any, bounds: tuple) -> Any:
    least = max((each.min_length for each in bounds if isinstance(each, MinLen)), default=0)
    if len(value) < least:
        raise Refused(f"at least {least} long")
    given = list(value)
    if origin is tuple and kinds[-1:] != (...,):
        if len(given) != len(kinds):
            raise Refused(f"tuple[{', '.join(map(words, kinds))}]", of_type=True)
        items = [_item(each, kind, is_a) for each, kind in zip(given, kinds, strict=True)]
    else:
        items = [_item(each, kinds[0], is_a) for each in given]
    if all(a is b for a, b in zip(given, items, strict=True)):
        return value
    return items if _is_array(value) else type(value)(items)


def _item(value: Any, kind: Any, is_a: Any) -> Any:
    try:
        return fitted(value, kind, is_a)
    except Refused as error:
        raise Refused(f"each {error}", of_type=error.of_type) from None


def _key(value: Any, kind: Any, is_a: Any) -> Any:
    try:
        return fitted(value, kind, is_a)
    except Refused as error:
        raise Refused(f"by {error}", of_type=error.of_type) from None


def _within(value: Any, annotation: Any, is_a: Any) -> Any:
    """The value, if what isn't a bound of numbers takes it too."""
    for each in annotation.__metadata__:
        if isinstance(each, OneOf) and isinstance(value, str) and value not in each.names:
            raise Refused(str(each))
        if isinstance(each, Leaves) and is_a is not None and not callable(value):
            try:
                leaves = jax.tree.leaves(value)
            except (TypeError, ValueError):  # keys without an order
                raise Refused(str(each), of_type=True) from None
            if not all(type(leaf) in each.kinds for leaf in leaves):
                raise Refused(str(each), of_type=True)
    return value


def told(annotation: Any, *, whole: bool = False) -> str:
    """The range in words; empty where it is no narrower than the type.

    Args:
      annotation: a parameter's.
      whole: with what goes without saying, such as that a number is finite.

    >>> told(Decay), told(Count | None), told(Literal["linear", "sqrt"]), told(str), told(Sequence[Positive])
    ('at least 0 and below 1', 'at least 1', "'linear' or 'sqrt'", '', 'each above 0')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = next((str(each) for each in annotation.__metadata__ if isinstance(each, OneOf)), "")
        return own or _bounds_told(annotation.__metadata__, whole=whole) or told(inner[0], whole=whole)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, (told(each, whole=whole) for each in inner))))
    if origin is Literal:
        return _choice(inner)
    if origin in (list, tuple, Sequence):
        each = told(inner[0], whole=whole)
        return f"each {each}" if each else ""
    if origin in (dict, Mapping):
        each = told(inner[1], whole=whole)
        return f"each {each}" if each else ""
    return ""


def _bounds_told(bounds: tuple, *, whole: bool) -> str:
    texts = [
        f"{_BOUNDS[type(each)][1]} {_plain(getattr(each, _BOUNDS[type(each)][0]))}"
        for each in bounds
        if type(each) in _BOUNDS and (whole or each != INT32) and abs(getattr(each, _BOUNDS[type(each)][0])) != math.inf
    ]
    if whole and Lt(math.inf) in bounds:
        texts.append("finite")
    return " and ".join(texts)


def _plain(bound: float) -> str:
    return "2^31" if bound == 2**31 else f"{bound:g}"


def _choice(values: tuple) -> str:
    shown = [repr(each) for each in values]
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def words(annotation: Any) -> str:
    """A type as a person would write it, without ranges.

    >>> words(Count | None), words(Sequence[Annotated[str, OneOf(["a"])]])
    ('int | None', 'Sequence[str]')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        leaves = next((str(each) for each in annotation.__metadata__ if isinstance(each, Leaves)), None)
        return leaves or words(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(words, inner)))
    if origin is Literal:
        return _choice(inner)
    if origin is not None and inner:
        name = getattr(origin, "__name__", str(origin))
        return f"{name}[{', '.join('...' if each is ... else words(each) for each in inner)}]"
    if annotation in (None, NoneType):
        return "None"
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def shown(value: Any, most: int = 60) -> str:
    """A value in a message: one line, and no longer than a line.

    >>> shown("x" * 100)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of more digits than Python writes
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) <= most else f"{text[:most]}..."


def complaint(value: Any, name: str, parameter: inspect.Parameter, refused: Refused) -> str:
    """What is said of a value that was refused: one line."""
    usual = parameter.default
    helps = type(usual) in (int, float) and not refused.of_type
    wanted = f"must be {refused}".replace("be each ", "each be ")
    return f"{name} = {shown(value)} {wanted}" + (f": the default is {usual}" if helps else "")


def fit_arguments(
    arguments: dict[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    called: str = "",
    is_a: Callable[[Any, Any], bool] | None = None,
) -> None:
    """Checks arguments against their parameters' annotations, in place; a default is never wrong.

    Args:
      arguments: by name.
      parameters: of the function.
      called: the function's name, to stand before the argument's.
      is_a: see `fitted`.

    Raises:
      ValueError: names the first that is out of its range, its value and the range.
    """
    for name, value in arguments.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if value is parameter.default:
            continue
        try:
            arguments[name] = fitted(value, parameter.annotation, is_a)
        except Refused as refused:
            if refused.of_type and is_a is None and not _is_choice(parameter.annotation):
                continue
            full = f"{called}.{name}" if called else name
            raise ValueError(complaint(value, full, parameter, refused)) from None


def checked[F: Callable[..., Any]](function: F) -> F:
    """`function`, whose arguments are checked against the ranges of their annotations.

    Raises:
      ValueError: (when called) see `fit_arguments`.
    """
    signature = readable_signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # which Python says better
            return function(*args, **kwargs)
        fit_arguments(bound.arguments, signature.parameters)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def readable_signature(function: Callable) -> inspect.Signature:
    """The signature, with annotations that are text evaluated where they can be."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # what evaluating a text raises, such as one that is no Python
        return inspect.signature(function)


@functools.cache
def parameters_of(kind: type) -> dict[str, inspect.Parameter]:
    """The fields of a dataclass, as parameters with their annotations."""
    hints = get_type_hints(kind, include_extras=True)
    given = inspect.signature(kind).parameters
    return {field.name: given[field.name].replace(annotation=hints[field.name]) for field in dataclasses.fields(kind)}


def check_fields(instance: Any) -> None:
    """That the fields of a dataclass are in their ranges, for its `__post_init__`.

    Raises:
      ValueError: see `fit_arguments`.
    """
    parameters = parameters_of(instance.__class__)
    values = {name: getattr(instance, name) for name in parameters}
    before = dict(values)
    fit_arguments(values, parameters)
    for name, value in values.items():
        if value is not before[name]:
            object.__setattr__(instance, name, value)

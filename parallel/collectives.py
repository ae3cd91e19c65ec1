"""What a compiled program says of its communication: each kind of collective, how often, and how many bytes.

The bytes are those that a device sends, by the algorithms that reach the bounds: with n devices in a group and a whole
array of S bytes, (n - 1) / n S for an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce, and
S for a collective-permute; where some devices keep what they have, the mean over all.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}


Shape = tuple[str, tuple[int, ...]]  # such as `("f32", (8, 128))`


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective, in one run of a program.

    Attributes:
      count: how many are run.
      sent_bytes: by each device.
    """

    count: float
    sent_bytes: float


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: one of `KINDS`.
      result_bytes: of what a device gets.
      group: how many devices take part together.
      runs: how often it is run, being inside loops.
      shapes: of the results.
      moving: of a collective-permute, the share of its senders that don't send to themselves.
    """

    kind: str
    result_bytes: int
    group: int
    runs: float
    shapes: tuple[Shape, ...]
    moving: float = 1.0

    @property
    def sent_bytes(self) -> float:
        """By each device, in one run."""
        n = self.group
        factor = {
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,  # the result is the n-th part of the array
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "collective-permute": self.moving,
        }
        return factor[self.kind] * self.result_bytes


def collectives(text: str, *, microbatches: float = 1) -> list[Collective]:
    """The collectives of a compiled program, those among a single device left out.

    Args:
      text: `compiled.as_text()`.
      microbatches: how often a loop runs whose trip count the program doesn't know: the one over microbatches.

    >>> text = '''
    ... ENTRY %main (p: f32[4,2]) -> f32[8,2] {
    ...   ROOT %g = f32[8,2]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
    ... }'''
    >>> [(c.kind, c.group, c.result_bytes, c.sent_bytes) for c in collectives(text)]
    [('all-gather', 2, 64, 32.0)]
    """
    bodies = computations(text)
    runs = _runs(bodies, microbatches)
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    results, parts = [], set()
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if not match or not runs[name]:
                continue
            collective = _collective(line, match, runs[name])
            if name.startswith("all-reduce-scatter"):  # how TPUs write a reduce-scatter: the sum, then the slice
                sum_bytes = collective.result_bytes // collective.group
                collective = collective._replace(kind="reduce-scatter", result_bytes=sum_bytes)
            elif name in fused:
                # TPUs also run one collective in parts, in the shadow of several fusions; its channel tells.
                channel = re.search(r"channel_id=(\d+)", line)
                if channel and (key := (collective.kind, channel[1], collective.shapes)) in parts:
                    continue
                parts.add(key)
            if collective.group > 1:
                results.append(collective)
    return results


def traffic(text: str, *, microbatches: float = 1) -> dict[str, Traffic]:
    """Counts and bytes by kind; see `collectives`."""
    total = {kind: Traffic(0, 0) for kind in KINDS}
    for c in collectives(text, microbatches=microbatches):
        before = total[c.kind]
        total[c.kind] = Traffic(before.count + c.runs, before.sent_bytes + c.runs * c.sent_bytes)
    return total


def shapes_of(text: str) -> list[Shape]:
    """The arrays that a type names, such as `(f32[8,128]{1,0}, s8[4]{0})`.

    >>> shapes_of("(f32[8,128]{1,0}, s8[4]{0})")
    [('f32', (8, 128)), ('s8', (4,))]
    """
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", text)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found if dtype in ITEM_BYTES]


def bytes_of(shapes: Iterable[Shape]) -> int:
    """Of so many arrays together."""
    return sum(ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)


def _collective(line: str, match: re.Match, runs: float) -> Collective:
    kind, asynchronous = match[2], match[3]
    shapes = shapes_of(match[1])
    operands = line[match.end() :].split(")", 1)[0].count("%") or 1
    if asynchronous and len(shapes) >= 2 * operands:
        # The result of a start is (operands, results, and on some targets numbers of contexts).
        shapes = shapes[operands : 2 * operands]
    size = bytes_of(shapes)
    if kind != "collective-permute":
        return Collective(kind, size, _group_size(line), runs, tuple(shapes))
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs")[-1])
    moving = sum(sender != receiver for sender, receiver in pairs) / max(1, len(pairs))
    return Collective(kind, size, 2 if moving else 1, runs, tuple(shapes), moving)


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    assert match, f"no replica groups that this parser knows in: {line}"
    return match[1].count(",") + 1


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry's name is `ENTRY`."""
    bodies: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies


def _trips(line: str, bodies: Mapping[str, list[str]]) -> float | None:
    """How often a loop runs: the compiler says it, or its condition compares a count from 0 with a constant."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', line):
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition
    lines = bodies.get(condition[1], [])
    root = re.search(r"ROOT .* compare\(.*?, %?([\w.\-]+)\), direction=LT", "\n".join(lines))
    constants = dict(re.findall(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(lines)))
    return float(constants[root[1]]) if root and root[1] in constants else None


def _runs(bodies: Mapping[str, list[str]], unknown: float) -> dict[str, float]:
    """How often each computation is run; of the branches of a conditional, one."""
    calls: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            if match := re.search(r"body=%?([\w.\-]+)", line):
                calls[name].append((match[1], _trips(line, bodies) or unknown))
            for callee in re.findall(r"(?:calls|to_apply|async_execution_thread_body)=%?([\w.\-]+)", line):
                calls[name].append((callee, 1.0))
            branches = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", line)
            if match := re.search(r"branch_computations=\{(.*?)\}", line):
                branches += re.findall(r"%?([\w.\-]+)", match[1])
            calls[name] += [(branch, 1 / len(branches)) for branch in branches]
    runs: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for callee, each in calls[name]:
            if callee in bodies:
                visit(callee, times * each)

    visit("ENTRY", 1.0)
    return runs

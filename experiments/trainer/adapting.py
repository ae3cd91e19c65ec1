"""A checkpoint of a run that was set up otherwise: what of it is carried over, and what begins anew.

Parameters and the optimizer's own state must be the same arrays. What is wrapped around the optimizer (`wrapping.py`)
may be another one now: a batch-size policy, a noise scale or a guard goes on with what it knew where its arrays have
the same names and shapes, and begins anew where they don't.
"""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from crescendo.experiments.runs.arrays import Names, by_path, describe_arrays
from crescendo.experiments.runs.folder import read_info
from crescendo.experiments.runs.metadata import numbers
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.shapes import initial_state
from crescendo.experiments.trainer.wrapping import Wraps

Arrays = Mapping[Names, str]

ESSENTIAL = ("state", "optimizer", "average", "batch_size")
"""The parts of a state (`Wraps.part`) without which a run can't go on."""
_KNOWN_BY = {"guard": ("passed",), "noise": ("total", "updates")}


class Adapting:
    """What a session takes of a checkpoint (`runs.arrays.Adapting`).

    Args:
      session: that goes on from it.
    """

    def __init__(self, session: Session):
        self._session = session
        self.wanted = by_path(describe_arrays(session.abstract_state))

    def carried(self, saved: Arrays) -> dict[Names, Names] | None:
        """Where each array that is carried over lies in the checkpoint; None: something essential isn't there.

        Args:
          saved: what the checkpoint holds: dtype and shape of every array.
        """
        now = self._session.wraps
        parts = _by_part(now, self.wanted)
        ways = [now, *(Wraps(g, now.averaged, n) for g, n in itertools.product((False, True), repeat=2))]
        for wraps in ways:
            there = _by_part(wraps, saved)
            has = {"guard": wraps.guarded, "noise": wraps.noisy}
            if any(has[part] and path not in there.get(part, {}) for part, path in _KNOWN_BY.items()):
                continue
            same = {part for part in parts | there if _texts(parts, part) == _texts(there, part)}
            if same >= {part for part in ESSENTIAL if part in parts or part in there}:
                pairs = [(parts[part], there[part]) for part in same if part in parts]
                return {own[name][0]: theirs[name][0] for own, theirs in pairs for name in own}
        return None

    def can_take(self, described: Mapping[str, str]) -> bool:
        """Whether a run of these arrays (`describe_arrays`) goes on as this session."""
        return self.carried(by_path(described)) is not None

    def fresh(self, paths: Collection[Names]) -> dict[Names, jax.Array]:
        """Those arrays as a run begins with them, laid out as the session wants them."""
        session = self._session

        def begin() -> list[jax.Array]:
            state = initial_state(session.task, session.optimizer, session.seed, session.trainable)
            leaves = dict(zip(self.wanted, jax.tree.leaves(state), strict=True))
            return [leaves[path] for path in paths]

        shardings = dict(zip(self.wanted, jax.tree.leaves(session.shardings), strict=True))
        made = jax.jit(begin, out_shardings=[shardings[path] for path in paths])()
        return dict(zip(paths, made, strict=True))


def as_begun(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """A session's arguments for going on in a run's folder: the rate stays meant for the batch size that it began with.

    Args:
      folder: the run's; without a checkpoint nothing is gone on with.
      options: as given; a `base_batch_size` among them counts.
    """
    begun = read_info(folder) if numbers(folder / "checkpoints") else None
    base = (begun or {}).get("base_batch_size")
    if options.get("base_batch_size") is not None or not isinstance(base, int) or base < 1:
        return dict(options)
    return {**options, "base_batch_size": base}


def _by_part(wraps: Wraps, arrays: Arrays) -> dict[str, dict[Names, tuple[Names, str]]]:
    """The arrays by the part that each belongs to, and its names within."""
    parts: dict[str, dict[Names, tuple[Names, str]]] = {}
    for path, text in arrays.items():
        part, name = wraps.part(path)
        parts.setdefault(part, {})[name] = path, text
    return parts


def _texts(parts: Mapping[str, Mapping[Names, tuple[Names, str]]], part: str) -> dict[Names, str]:
    return {name: text for name, (_, text) in parts.get(part, {}).items()}

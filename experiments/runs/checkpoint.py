"""Checkpoints: one train state and its clock, saved by orbax in the background, restored onto any mesh.

A checkpoint's number is `examples_seen`. Orbax notices a missing or cut file, not a flipped bit in an array, so each
checkpoint also carries a fingerprint of every array, taken on the device, and one of all that it says of itself
(`metadata.py`). A save is read back before it gets its name, and only then an older checkpoint goes.
"""

import bisect
import collections
import contextlib
import io
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from crescendo.experiments.runs import metadata, storage
from crescendo.experiments.runs.arrays import Adapting, Names, by_path, describe_arrays, leaves_by_path
from crescendo.experiments.runs.keeping import FirstOfEach, Those
from crescendo.experiments.runs.metadata import DamagedError
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.optim.scaling import ScaleByLearningRateState, WithLearningRateState
from crescendo.optim.states import find_states
from crescendo.parallel.hosts import is_leader


def _bits(array) -> jax.Array:
    """The array's bytes as a flat uint32 or narrower vector."""
    width = jnp.dtype(array.dtype).itemsize * 8
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8).ravel()
    return jax.lax.bitcast_convert_type(array, unsigned).ravel()


@jax.jit
def fingerprints(tree: Any) -> Any:
    """One uint32 an array: `sum_i bits_i (2 i + 1) mod 2^32`. Any single changed entry changes it.

    An odd factor is invertible modulo 2^32, so a change of one entry can't be lost; the factor differs between
    entries, so a swap shows too. It doesn't depend on how the array is laid out over devices.
    """

    def one(array):
        bits = _bits(array).astype(jnp.uint32)
        return jnp.sum(bits * (2 * jax.lax.iota(jnp.uint32, bits.size) + 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _shapes(tree: Any) -> collections.Counter:
    """How many of a tree's arrays have each shape and dtype."""
    return collections.Counter((tuple(x.shape), jnp.dtype(x.dtype).name) for x in jax.tree.leaves(tree))


def _prints(tree: Any) -> list[int]:
    """The fingerprints of a tree's arrays, in the order of its leaves."""
    return [int(x) for x in jax.device_get(jax.tree.leaves(fingerprints(tree)))]


_hooks_before: dict[str, Callable[[Any], object]] = {}


# Both are the module's and stay there: a thread may be about to call a hook that another one puts back just then, and
# Python keeps no reference of its own until it does; a closure was freed under it, which ends the process.
def _unless_saving(raised: threading.ExceptHookArgs) -> None:
    if not type(raised.thread).__module__.startswith("orbax."):
        _hooks_before["excepthook"](raised)


def _unless_loop_closed(raised: Any) -> None:
    # Writers that end after one of them failed find their event loop closed.
    if str(raised.exc_value) != "Event loop is closed":
        _hooks_before["unraisablehook"](raised)


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Keeps quiet about what `Checkpoints` says itself: orbax's threads print it, and its log repeats it."""
    excepthook, unraisablehook, verbosity = threading.excepthook, sys.unraisablehook, logging.get_verbosity()
    if unraisablehook is not _unless_loop_closed:
        _hooks_before.update(excepthook=excepthook, unraisablehook=unraisablehook)
    threading.excepthook, sys.unraisablehook = _unless_saving, _unless_loop_closed
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = excepthook, unraisablehook
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _damaged_to_all() -> Iterator[None]:
    """Of several processes, which read each its own parts of a checkpoint, all find it damaged where one of them does.

    The others would go on with it while that one tries an older one, and compute together with what isn't the same.
    """
    problem: DamagedError | None = None
    try:
        yield
    except DamagedError as error:
        problem = error
    if jax.process_count() > 1:
        damaged = multihost_utils.process_allgather(np.array(problem is not None))
        if problem is None and damaged.any():
            problem = DamagedError(f"process {int(np.argmax(damaged))} can't read its part")
    if problem is not None:
        raise problem


def _arrays(checkpoint: Path, item: str, restore: ocp.args.CheckpointArgs) -> Any:
    """What is in a checkpoint's files of an item, by the item's handler: a manager waits for the other processes.

    Raises:
      DamagedError: something else is in them.
      UserError: they can't be read.
    """
    handler = (
        ocp.PyTreeCheckpointHandler if isinstance(restore, ocp.args.PyTreeRestore) else ocp.StandardCheckpointHandler
    )
    try:
        storage.check_regular(checkpoint)
        # Readers on other threads print their own tracebacks about a damaged file; the message says it all.
        with contextlib.redirect_stderr(io.StringIO()):
            return handler().restore(storage.LiteralPath(checkpoint.absolute() / item), args=restore)
    except (DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax and tensorstore raise what they like at files that hold something else
        storage.check_readable(checkpoint, error)
        raise DamagedError(_says(error)) from None


def _says(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


class _NotReadBackError(Exception):
    """What was written can't be read."""


class Checkpoints:
    """The checkpoints of one run: a context, which waits at its end for the save under way.

    Args:
      folder: where they are; made when it isn't there.
      run: what the run is, kept with each (`metadata.RunIdentity`).
      keep_last: how many of the newest to keep.
      keep_every_examples: also keep one every so many examples, for ever; None: none.
      keep_at_examples: also keep the first at or after each of these, for ever.
      read_only: touch nothing: another process may be saving there.

    Attributes:
      keep_last: as given.
      best: the checkpoint to keep besides, by its examples; None: none.
      keep: asked at each save which of the checkpoints, by their examples, must stay.
      adapting: what of a checkpoint is taken whose arrays are others than those that are wanted; None: nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        keep_every_examples: int | None = None,
        keep_at_examples: Sequence[int] = (),
        read_only: bool = False,
    ):
        storage.check_name(folder)
        self.keep_last = keep_last
        self.best: int | None = None
        self.keep: Callable[[list[int]], set[int]] = lambda saved: set()
        self.adapting: Adapting | None = None
        self._run = run
        self._written: tuple[int, dict[str, collections.Counter]] = (0, {})
        policies: list = [
            checkpoint_managers.LatestN(keep_last),
            Those(lambda saved: [self.best]),
            Those(lambda saved: self.keep(saved)),
        ]
        if keep_every_examples is not None:
            policies.append(FirstOfEach(lambda examples: 1 + examples // keep_every_examples))
        if keep_at_examples:
            at = sorted(keep_at_examples)
            policies.append(FirstOfEach(lambda examples: bisect.bisect_right(at, examples)))
        with _said_once(), file_access("read" if read_only else "write", folder):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._read_back),
            )
            self._manager = ocp.CheckpointManager(storage.LiteralPath(folder.absolute()), options=options)
        self.folder = folder

    def __enter__(self) -> "Checkpoints":
        """Until the end of the block errors of orbax's threads are raised by `wait` alone, and not printed too."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_said_once())
            stack.callback(self._close)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        """Waits, and lets go of the folder."""
        self._exit.close()

    def saved(self) -> list[int]:
        """The examples of every checkpoint, increasing."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, clock: Clock, evaluation: Any = None) -> None:
        """Starts saving; returns when the arrays have been copied to the host. One save is under way at a time.

        Args:
          state: at the clock.
          clock: its `examples_seen` numbers the checkpoint.
          evaluation: the parameters to evaluate and to use, where they aren't the state's own.
        """
        self.wait()
        items = {"state": state} if evaluation is None else {"state": state, "evaluation": {"parameters": evaluation}}
        prints = {f"{'' if item == 'state' else 'evaluation_'}fingerprints": _prints(x) for item, x in items.items()}
        says = metadata.sealed(clock, self._run, **prints)
        self._written = clock.examples_seen, {item: _shapes(tree) for item, tree in items.items()}
        saves = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        with self._save_errors():
            self._manager.save(clock.examples_seen, args=ocp.args.Composite(**saves, meta=ocp.args.JsonSave(says)))

    def _read_back(self) -> None:
        """Has the save that was just written on the disk, and reads it: metadata, and every array's shape and dtype.

        Orbax calls this in its own thread, before the checkpoint gets its name; what it raises stops the save there.
        """
        number, expected = self._written
        place = self.folder / f"{number}{ocp.utils.TMP_DIR_SUFFIX}"
        storage.sync_folder(place)
        try:
            metadata.read(place, number)
            for item, shapes in expected.items():
                found = ocp.PyTreeCheckpointHandler().metadata(storage.LiteralPath(place.absolute() / item)).tree
                if _shapes(found) != shapes:
                    raise DamagedError(f"of its {sum(shapes.values())} arrays {sum(_shapes(found).values())} are there")
        except DamagedError as problem:
            raise _NotReadBackError(str(problem)) from None
        except (ValueError, KeyError, FileNotFoundError) as error:
            if not place.is_dir():
                raise
            raise _NotReadBackError(_says(error)) from error

    def restore(
        self, abstract: TrainState, report: Callable[[str], None], among: Sequence[int] | None = None
    ) -> tuple[TrainState, Clock] | None:
        """The first complete checkpoint, or None where there is none; a damaged one is reported, and set aside.

        Args:
          abstract: shapes, dtypes and shardings wanted.
          report: called with a line about each damaged checkpoint.
          among: the checkpoints to try in this order, by their examples; None: all, the newest first.

        Raises:
          UserError: when there are checkpoints and all are damaged.
        """
        damaged: list[int] = []
        for step in self.saved()[::-1] if among is None else among:
            try:
                restored = self._load(step, abstract, report)
            except DamagedError as problem:
                report(f"checkpoint {self.folder / str(step)} is damaged ({problem}); trying the one before it")
                damaged.append(step)
            else:
                self._set_aside(damaged)
                return restored
        if damaged:
            which = "every checkpoint" if among is None else "every checkpoint to go back to"
            raise UserError(
                f"{which} in {self.folder} is damaged ({', '.join(map(str, damaged))}): "
                "move the folder away to start anew"
            )
        return None

    def restore_at(self, examples: int, abstract: TrainState) -> tuple[TrainState, Clock]:
        """The checkpoint of exactly so many examples.

        Raises:
          UserError: where there is none, or it is damaged.
        """
        self._check_saved(examples)
        try:
            return self._load(examples, abstract)
        except DamagedError as problem:
            folder = self.folder / str(examples)
            raise UserError(f"checkpoint {folder} is damaged ({problem}): run it again in another folder") from None

    def _check_saved(self, examples: int) -> None:
        if examples not in (steps := self.saved()):
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder} has no checkpoint at {examples} examples: give one that it has ({there})")

    def restore_parameters(self, shapes: Any, at: int | None = None) -> tuple[Any, int]:
        """A checkpoint's parameters to use, whole on one device, and its `examples_seen`.

        They are the ones to evaluate: an average where the run keeps one, else the state's own.

        Args:
          shapes: of the parameters, as `jax.eval_shape` gives them.
          at: which checkpoint, by its examples; None: the newest.

        Raises:
          UserError: where there is none, or it is damaged or of another shape.
        """
        if at is not None:
            self._check_saved(at)
        step = self._manager.latest_step() if at is None else at
        if step is None:
            raise UserError(f"{self.folder} has no checkpoint yet")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {"parameters": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)}
        restore = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        item = "evaluation" if (self.folder / str(step) / "evaluation").is_dir() else "state"
        try:
            arrays, _ = self._read(step, restore, item)
        except DamagedError as problem:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged ({problem}): move it away, to take the one before it"
            ) from None
        return arrays["parameters"], step

    def _load(
        self, step: int, abstract: TrainState, report: Callable[[str], None] = lambda line: None
    ) -> tuple[TrainState, Clock]:
        """One checkpoint."""
        others = None if self.adapting is None else self._other_arrays(step)
        if others is None:
            state, says = self._read(step, ocp.args.StandardRestore(abstract))
        else:
            state, says = self._adapted(step, abstract, *others)
        clock = Clock(**dict(says.clock))
        counting = find_states(state.opt_state, ScaleByLearningRateState, WithLearningRateState)
        counts = jax.device_get([state.skipped_steps, *(each.count for each in counting)])
        if (most := max(map(int, counts))) > clock.steps:
            raise DamagedError(f"its clock says {clock.steps} steps, its state {most}")
        if says.fingerprint is None:
            report(f"checkpoint {self.folder / str(step)} is of a version whose metadata had no fingerprint yet")
        return state, clock

    def _other_arrays(self, step: int) -> tuple[Any, dict[Names, Names]] | None:
        """The arrays of a checkpoint that aren't those wanted, and what is carried over; None where it holds those."""
        assert self.adapting is not None
        try:
            state = storage.LiteralPath(self.folder.absolute() / str(step) / "state")
            tree = ocp.PyTreeCheckpointHandler().metadata(state).tree
        except (ValueError, KeyError, FileNotFoundError):
            return None  # what is wrong with it reading it will say
        saved = by_path(describe_arrays(tree))
        carried = None if saved == self.adapting.wanted else self.adapting.carried(saved)
        return None if carried is None else (tree, carried)

    def _adapted(
        self, step: int, abstract: TrainState, tree: Any, carried: Mapping[Names, Names]
    ) -> tuple[TrainState, metadata.Metadata]:
        """A checkpoint of a run that was set up otherwise; what isn't carried over begins anew."""
        assert self.adapting is not None
        wanted = leaves_by_path(abstract)
        shardings = {there: wanted[own].sharding for own, there in carried.items()}
        template = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings.get(path, abstract.skipped_steps.sharding))
            for path, x in leaves_by_path(tree).items()
        ]
        restore = ocp.args.StandardRestore(jax.tree.unflatten(jax.tree.structure(tree), template))
        arrays, says = self._read(step, restore, in_order=False)
        restored = leaves_by_path(arrays)
        state = {path: restored[there] for path, there in carried.items()}
        state |= self.adapting.fresh([path for path in wanted if path not in carried])
        return jax.tree.unflatten(jax.tree.structure(abstract), [state[path] for path in wanted]), says

    def _read(
        self, step: int, restore: ocp.args.CheckpointArgs, item: str = "state", *, in_order: bool = True
    ) -> tuple[Any, metadata.Metadata]:
        """A checkpoint's item, or the first arrays of it, compared with their fingerprints, and what is said of it.

        Of arrays that aren't `in_order` each must have one of the fingerprints.

        Raises:
          DamagedError: what is in its files isn't what was saved.
          UserError: its files can't be read.
        """
        folder = self.folder / str(step)
        with _damaged_to_all():
            says, arrays = metadata.read(folder, step), _arrays(folder, item, restore)
        prints, theirs = _prints(arrays), says.of(item)
        if (in_order and prints != theirs[: len(prints)]) or collections.Counter(prints) - collections.Counter(theirs):
            raise DamagedError("its arrays are not the ones that were saved")
        return arrays, says

    def _set_aside(self, damaged: list[int]) -> None:
        """Moves damaged checkpoints out of the way, so that the run can save there again."""
        for step in damaged if is_leader() else ():
            names = itertools.chain([""], (f"_{count}" for count in itertools.count(2)))
            places = (self.folder.with_name(f"damaged_checkpoint_{step}{name}") for name in names)
            free = next(place for place in places if not place.exists())
            with file_access("write", self.folder):
                (self.folder / str(step)).rename(free)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def wait(self) -> None:
        """Until the save under way is on disk; raises what went wrong with it."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def _close(self) -> None:
        with self._save_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """What fails while saving is mostly the disk; orbax and tensorstore raise it as many types."""
        try:
            yield
        except _NotReadBackError as error:
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: what was written doesn't read back ({error}); those "
                "before it are kept: give another folder with --run, on another disk or of a plainer name"
            ) from error
        except Exception as error:
            if (told := storage.cannot_save(self.folder, error)) is None:
                raise
            raise told from error

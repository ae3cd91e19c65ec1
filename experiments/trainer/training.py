"""A training run in a folder: configuration, checkpoints, records, and the loop between them."""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax

from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs import storage
from crescendo.experiments.runs.arrays import describe_arrays
from crescendo.experiments.runs.checkpoint import Checkpoints
from crescendo.experiments.runs.records import Record, began_at, gaps
from crescendo.experiments.runs.run import is_complete, read_checked_records
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runtime import from_python, hardware
from crescendo.experiments.runtime.arguments import checked, with_options_of
from crescendo.experiments.runtime.cache import CompilationCounter, use_compilation_cache
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access, local_path, replace_file
from crescendo.experiments.runtime.interruption import Interruption
from crescendo.experiments.runtime.start import command_seconds
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.adapting import Adapting, as_begun
from crescendo.experiments.trainer.ahead import begin_compiling, prepared_session
from crescendo.experiments.trainer.announcing import announce, announce_compiled
from crescendo.experiments.trainer.observers import WRITERS, check_writers, run_observers
from crescendo.experiments.trainer.probes import Probe, Seen
from crescendo.experiments.trainer.recorder import Recorder
from crescendo.experiments.trainer.run_files import RunFiles
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.starting import fresh_state, state_of
from crescendo.experiments.trainer.step_trace import StepTrace
from crescendo.experiments.trainer.stopping import Stops
from crescendo.experiments.trainer.wall_clock import StartClock, WallClock
from crescendo.experiments.trainer.watching import check_patience
from crescendo.models.config import SPEED_FIELDS
from crescendo.pallas_kernels.console import plain_console
from crescendo.parallel import hosts
from crescendo.ranges import Count, OneOf, Positive, Tokens

# Settings that say how fast a run is, who sees it and where data are kept, and not what it computes.
_AT_WILL = re.compile(
    r"(.*/)?(train\.(writers|mesh|strategy|max_microbatch_examples|profile_steps)|(mesh|strategy)\.\w+"
    rf"|\w+\.({'|'.join(SPEED_FIELDS)}|cache_directory))"
)

# That are said as a run goes on.
_MOST_GAPS = 5

# Of this process so far: what went by before the first one is a start's own.
_starts = itertools.count()

FORMAT = 2
"""Of what a run's folder says of itself and of the optimizer's state: raised when either changes its shape."""


@checked
@with_options_of(Session, without=("further_sizes", "platform"))
def train(
    *,
    run: str,
    initialize_from: str | None = None,
    start_from: str | None = None,
    evaluate_every_examples: Count | None = None,
    evaluation_examples: Count = 512,
    checkpoint_every_examples: Count | None = None,
    keep_last_checkpoints: Count = 2,
    keep_checkpoint_every_examples: Count | None = None,
    keep_checkpoints_at_examples: Sequence[Count] = (),
    keep_best_checkpoint: bool = False,
    probes: Sequence[Probe] = (),
    profile_steps: Count | None = None,
    stop_at_loss: Positive | None = None,
    stop_after_minutes: Positive | None = None,
    stop_after_tokens: Tokens | None = None,
    max_bad_steps: Count = 10,
    writers: Sequence[Annotated[str, OneOf(WRITERS)]] = (),
    label: str | None = None,
    operative_config: Callable[[], str] | None = None,
    differences: Callable[..., tuple[dict[str, str], dict[str, str]]] | None = None,
    written: Callable[[str], str] | None = None,
    **options: Any,
) -> dict:
    """Trains a task, or goes on where the run in the folder `run` stopped.

    Args:
      run: the run's folder: configuration, metrics, checkpoints, report.
      initialize_from: a run's folder, `RUN@EXAMPLES` for one of its checkpoints, or a folder in Hugging Face's format,
        whose parameters a fresh run starts from; experts begin as copies where it has none. None: random ones.
      start_from: `RUN@EXAMPLES`, a checkpoint of another run whose whole state a fresh run goes on from: a constant
        rate annealed from any of its checkpoints, say.
      evaluate_every_examples: validate so often, and at the end; None: a fifth of the run.
      evaluation_examples: how many held-out rows.
      checkpoint_every_examples: save so often, and at the end; None: a tenth of the run.
      keep_last_checkpoints: how many of the newest stay.
      keep_checkpoint_every_examples: one so often stays for ever; None: none.
      keep_checkpoints_at_examples: also save at the first step that reaches each of these, and keep it for ever.
      keep_best_checkpoint: save whenever the validation loss is the lowest so far, and keep the best.
      probes: what looks at the run and never changes it.
      profile_steps: so many steps, from the fourth of a start on, are traced into `RUN/profile` by JAX's profiler, for
        XProf, TensorBoard or Perfetto; None: none. On a GPU kernels have their names there with
        `XLA_FLAGS=--xla_gpu_enable_command_buffer=` in the environment.
      stop_at_loss: the run ends at the first evaluation whose loss on held-out rows is at most this.
      stop_after_minutes: it ends after so much training time: over all resumes, and without compilation, evaluation and
        checkpoints.
      stop_after_tokens: it ends after so many; the schedule stays that of `total_examples`, as with the other two.
      max_bad_steps: stop after so many steps in a row without a finite loss and update.
      writers: who gets the metrics besides `metrics.jsonl` and TensorBoard, such as ["wandb"] (Weights & Biases).
      label: the run's name in reports; the folder's when None.
      operative_config: gives the configuration text to keep with the run; `bind` passes it, else the text says what the
        run was given.
      differences: of an earlier such text and what is set now; `bind` passes it, else what was given is compared as far
        as it has a text.
      written: gives a setting as the config has it; `bind` passes it.
      **options: what is trained and how: those of `Session`.

    Returns:
      The last validation record: `loss`, `step`, `examples_seen`, `seconds`, and the rest of `metrics.jsonl`'s.

    Raises:
      UserError: for what the user can mend.
    """
    operative_config = operative_config or functools.partial(from_python.given, _set_in_python(locals()))
    differences = differences or functools.partial(from_python.differences, now=operative_config())
    _check_folders(run, initialize_from, start_from)
    check_writers(writers)
    start, counter = StartClock(0.0 if next(_starts) else command_seconds()), CompilationCounter()
    use_compilation_cache()
    session = prepared_session(as_begun(Path(run), options), evaluation_examples, start)
    wall = WallClock()
    adapting = Adapting(session)
    session.check_rows()
    check_patience(session.guard, max_bad_steps)
    stops = Stops(stop_at_loss, stop_after_minutes, stop_after_tokens)
    session.notes += stops.notes(session.task, options["total_examples"])
    folder, console = Path(run), plain_console(quiet=not hosts.is_leader())
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        fixed = _fixed(session, initialize_from, start_from)
        opened = _opened(folder, session, label or folder.name, fixed, adapting, evaluation_examples, written, say)
        info, held = stack.enter_context(opened)
        start.done("compiling")
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(
            Checkpoints(
                folder / "checkpoints",
                run={"format": FORMAT, "fixed": fixed},
                keep_last=keep_last_checkpoints,
                keep_every_examples=keep_checkpoint_every_examples,
                keep_at_examples=keep_checkpoints_at_examples,
            )
        )
        checkpoints.adapting = adapting
        state, clock = _begin(session, checkpoints, initialize_from, start_from, say)
        start.done("first state")
        info["total_examples"] = total_examples = session.end_from(clock.examples_seen)
        if total_examples < session.total_examples:
            say(f"note: the run ends at {total_examples:,} examples: what is left after them fills no microbatch")
        before, now = run_folder.changed_settings(folder, differences) if checkpoints.saved() else ({}, {})
        records = read_checked_records(folder / "metrics.jsonl")
        validation = _validation_at(records, clock.examples_seen)
        ended = stops.reason(session.task, clock, clock.seconds, validation)
        finished = ended or clock.examples_seen >= total_examples
        if finished and validation and is_complete(folder):
            _say_complete(folder, ended, before, now, say)
            return validation
        _say_of_going_on(folder, clock, records, fixed, run_folder.differing(before, now), say)
        # Compiled before anything is written.
        evaluate, looks = session.evaluation(evaluation_examples), [_prepared(probe, session) for probe in probes]
        start.done("evaluation")
        wall.go_on(records, clock.seconds)
        recorder = _opened_recorder(stack, folder, session, info, clock, wall, writers)
        recorder.settings(clock, before, now)
        _write_begun(folder, info, operative_config(), options["data"])
        files = RunFiles(
            folder, session, checkpoints, recorder, evaluate, held, clock.examples_seen, keep_best_checkpoint
        )
        save_every = checkpoint_every_examples or max(1, total_examples // 10)
        saves = loop.Event(files.save, save_every, tuple(keep_checkpoints_at_examples))
        files.begin(clock, validation, records, functools.partial(saves.due, last=total_examples))
        start.done("folder")
        say(str(start))
        info["start_seconds"] = start.seconds
        events = [
            *(_event(probe, look, recorder) for probe, look in zip(probes, looks, strict=True)),
            loop.Event(files.validate, evaluate_every_examples or max(1, total_examples // 5)),
            saves,
        ]
        trace = stack.enter_context(StepTrace(folder / "profile", profile_steps, say))
        of_loop: dict[str, Any] = {"recorder": recorder, "events": events, "watch": files.watch, "trace": trace}
        run_on = functools.partial(loop.run, session, max_bad_steps=max_bad_steps, **of_loop)
        write = functools.partial(_write_end, folder, info, counter, operative_config)
        of_end = files.run(
            run_on, state, clock, end=total_examples, stops=stops, interruption=interruption, write=write
        )
    _say_end(files, of_end, total_examples, say)
    return files.validation


def _say_end(files: RunFiles, of_end: Mapping[str, Any], total_examples: int, say: Callable[[str], None]) -> None:
    """What a person should know of how a run ended."""
    if files.watch.health.is_worse:
        say(f"note: the run has not come back to what it was; {files.watch.way_back}")
    if of_end["total_examples"] < total_examples:
        say(f"{files.folder} ended at {of_end['total_examples']:,} of {total_examples:,} examples: {of_end['ended']}")


def _write_end(
    folder: Path,
    info: dict[str, Any],
    counter: CompilationCounter,
    config: Callable[[], str],
    of_end: dict[str, Any],
) -> None:
    run_folder.write_info(folder, info | {"compilations": counter.count} | of_end, config())


def _set_in_python(local: dict[str, Any]) -> dict[str, Any]:
    """The settings among `train`'s arguments."""
    others = ("run", "operative_config", "differences", "written", "options")
    return {name: value for name, value in local.items() if name not in others} | local["options"]


@contextlib.contextmanager
def _opened(
    folder: Path,
    session: Session,
    name: str,
    fixed: dict[str, Any],
    adapting: Adapting,
    evaluation_examples: int,
    written: Callable[[str], str] | None,
    say: Callable[[str], None],
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Holds the run's folder for this process, and gives what its `run.json` is to say; compiles, and says what.

    Yields:
      That, and a check that the folder is still held.

    Raises:
      UserError: a folder in use, of another run, or that can't be written.
    """
    with run_folder.locked(folder) as held:
        before = run_folder.check_resumable(folder, FORMAT, fixed, adapting.can_take)
        begun = {name: value for name, value in (before or run_folder.provenance()).items() if name != "ended"}
        announce(session, written, say)
        begin_compiling(session, evaluation_examples)
        info = _describe(session, name, fixed)
        announce_compiled(session, say)
        yield begun | info, held


def _begin(
    session: Session,
    checkpoints: Checkpoints,
    initialize_from: str | None,
    start_from: str | None,
    say: Callable[[str], None],
) -> tuple[TrainState, Clock]:
    """The newest checkpoint's state and clock; where there is none, those that a run begins with.

    Raises:
      UserError: every checkpoint is damaged, or a complete run has none any more: a new one would replace its records.
    """
    restored, folder = checkpoints.restore(session.abstract_state, report=say), checkpoints.folder.parent
    if restored is not None:
        seen = restored[1].examples_seen
        say(f"going on at {seen:,} of {session.total_examples:,} examples in {folder}")
        return restored
    if is_complete(folder):
        raise UserError(
            f"{folder} holds the records of a complete run and no checkpoint, and beginning anew would replace them: "
            "put its checkpoints back, or give another folder with --run"
        )
    if start_from is not None:
        say(f"starting from {start_from}, to {session.total_examples:,} examples")
        return state_of(start_from, session)
    return fresh_state(session, initialize_from), Clock(batch_size=session.policy.sizes[0])


def _say_of_going_on(
    folder: Path,
    clock: Clock,
    records: Sequence[Record],
    fixed: Mapping[str, Any],
    changed: str,
    say: Callable[[str], None],
) -> None:
    """What a person should hear of a run that goes on: settings that are others now, records that are lost."""
    if clock.examples_seen == (begin := began_at(fixed)):
        if records:
            say(f"note: no checkpoint is in {folder}: the run begins anew, without its {len(records):,} records")
        return
    if changed:
        say(f"note: from here on {changed}")
    elif not (folder / "config.gin").exists():
        say(f"note: {folder} has no config.gin: whether a setting is another one now isn't known")
    missing = gaps(records, begin=begin, end=clock.examples_seen)
    for gap in missing[:_MOST_GAPS]:
        say(f"note: {gap}")
    if more := len(missing[_MOST_GAPS:]):
        say(f"note: and {more:,} more such gaps")


def _opened_recorder(
    stack: contextlib.ExitStack,
    folder: Path,
    session: Session,
    info: Mapping[str, Any],
    clock: Clock,
    wall: WallClock,
    writers: Sequence[str],
) -> Recorder:
    """The recorder of a run in a folder from the clock on; the stack closes who sees its records."""
    observers = run_observers(
        folder,
        resume_at_examples=clock.examples_seen,
        total_examples=info["total_examples"],
        label=info["name"],
        unit=session.task.unit,
        writers=writers,
    )
    stack.callback(observers.close)
    return make_recorder(session, observers, clock.seconds, wall)


def make_recorder(
    session: Session, observe: Callable[[Record], None], seconds: float = 0.0, wall: WallClock | None = None
) -> Recorder:
    """The recorder of a session's steps."""
    task, devices = session.task, session.layout.mesh.devices
    peak = (hardware.peak_flops_per_second(devices.flat[0]) or 0.0) * devices.size or None
    return Recorder(
        observe,
        task.unit,
        task.units_per_example,
        session.flops_per_example,
        peak,
        wall or WallClock(),
        session.order.columns,
        seconds,
    )


def _prepared(probe: Probe, session: Session) -> Callable[[Clock, TrainState], Seen]:
    call = probe.call if probe.prepare is None else probe.prepare(session)
    assert call is not None
    return call


def _event(probe: Probe, look: Callable[[Clock, TrainState], Seen], recorder: Recorder) -> loop.Event:
    def record(clock: Clock, state: TrainState) -> None:
        seen = look(clock, state) or ()
        for each in (seen,) if isinstance(seen, Mapping) else seen:
            recorder.probe(clock, each, probe.kind)

    return loop.Event(record, probe.every_examples)


def _check_folders(run: str, initialize_from: str | None, start_from: str | None) -> None:
    for folder in filter(None, (run, initialize_from, start_from)):
        local_path(folder)
    storage.check_name(Path(run))
    if None not in (initialize_from, start_from):
        raise UserError("give train.initialize_from (parameters) or train.start_from (a whole state), not both")


def _validation_at(records: Sequence[Record], examples_seen: int) -> dict[str, Any]:
    """The validation that was recorded there; empty where there was none."""
    at = [record for record in records if record["kind"] == "validation" and record["examples_seen"] == examples_seen]
    return dict(at[0]) if at else {}


def _say_complete(
    folder: Path, ended: str | None, before: Mapping[str, str], now: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """That a run is complete, if it is asked for as it was trained, but for how fast it runs and who sees it.

    Raises:
      UserError: names the settings that differ.
    """
    then, asked = (
        {name: text for name, text in each.items() if not _AT_WILL.fullmatch(name)} for each in (before, now)
    )
    if shown := run_folder.differing(then, asked):
        raise UserError(f"{folder} is complete, and {shown}: undo that, or give another folder with --run")
    say(f"{folder} is complete{f' ({ended})' if ended else ''}; to train anew, give another folder with --run")


def _fixed(session: Session, initialize_from: str | None, start_from: str | None) -> dict[str, Any]:
    """What a run goes on only as: what decides its arrays, its data and its draws."""
    return {
        **({} if initialize_from is None else {"initialize_from": initialize_from}),
        **({} if start_from is None else {"start_from": start_from}),
        "task": session.task.name,
        "model": dict(session.task.identity),
        "arrays": describe_arrays(session.abstract_state),
        "data": session.task.data.fingerprint,
        "seed": session.seed,
    }


def _write_begun(folder: Path, info: dict[str, Any], config: str, data: Any) -> None:
    """What the folder says of a run before its first step: `info`, the configuration, the tokenizer of text.

    With the last the folder alone can generate and export.
    """
    run_folder.write_info(folder, info, config)
    tokenizer = getattr(data, "tokenizer", None)
    if hosts.is_leader() and tokenizer is not None:
        with file_access("write", folder):
            replace_file(folder / "tokenizer.json", tokenizer.to_json().encode())


def _describe(session: Session, name: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says of a run; its step is compiled for this."""
    task, mesh = session.task, session.layout.mesh
    peak = hardware.peak_flops_per_second(mesh.devices.flat[0])
    return {
        "format": FORMAT,
        "name": name,
        "unit": task.unit,
        "parameters": sum(x.size for x in jax.tree.leaves(session.parameters)),
        f"flops_per_{task.unit}": session.flops_per_example / task.units_per_example,
        "sequence_length": task.units_per_example,
        "total_examples": session.total_examples,
        "base_batch_size": session.base_batch_size,
        f"total_{task.unit}s": session.total_examples * task.units_per_example,
        "peak_flops_per_second": peak and peak * mesh.devices.size,
        "step_peak_bytes": session.peak_bytes,
        "microbatch_examples": session.plan.microbatch_examples,
        "fingerprint": task.fingerprint,
        "fixed": fixed,
    }

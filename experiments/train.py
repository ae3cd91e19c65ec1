"""The training loop: `python -m crescendo.experiments.train --config debug.gin`.

Step n is dispatched before the metrics of step n - 1 are read, and the batch-size decision lags by one step by
definition: the size decided by step n is that of step n + 2. So the device never idles for the host, and a resumed
run decides the same.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from crescendo import parallel
from crescendo.experiments import configurables, hardware, run_folder, trained
from crescendo.experiments.checkpoint import Checkpoints
from crescendo.experiments.cli import run_command
from crescendo.experiments.compile import CompilationCounter, compile_step, use_compilation_cache
from crescendo.experiments.data import Stream, TextData
from crescendo.experiments.errors import UserError, hosts_lost, user_values
from crescendo.experiments.evaluate import make_evaluation
from crescendo.experiments.feed import Feed
from crescendo.experiments.interruption import Interrupted, Interruption
from crescendo.experiments.metrics import file_access, read_records, replace_file, run_observers
from crescendo.experiments.program import chain_transforms, decide_model, fingerprint, needed_statistics
from crescendo.experiments.recorder import Recorder
from crescendo.experiments.state import Clock, describe_arrays
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import BatchSizePolicy, constant, current_batch_size
from crescendo.parallel import hosts

EXAMPLES = """examples:
  python -m crescendo.experiments.train --config debug.gin
  python -m crescendo.experiments.train --config lm_30m.gin --set 'text_files.paths = ["books/*.txt"]'
  python -m crescendo.experiments.train --config debug.gin --set 'train.total_examples = 2048' --run runs/short
  srun python -m crescendo.experiments.train --config lm_1b.gin --hosts auto

The same command goes on where an interrupted run stopped."""


def train(
    *,
    run: str,
    data: TextData,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    batch_size: int | BatchSizePolicy,
    total_examples: int,
    coupling: str = "sqrt",
    base_batch_size: int | None = None,
    noise_scale: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    strategy: str | parallel.Strategy = "fsdp",
    seed: int = 0,
    initialize_from: str | None = None,
    max_gradient_norm: float | None = 1.0,
    max_microbatch_examples: int | None = None,
    evaluate_every_examples: int | None = None,
    evaluation_examples: int = 512,
    checkpoint_every_examples: int | None = None,
    keep_last_checkpoints: int = 2,
    keep_checkpoint_every_examples: int | None = None,
    keep_checkpoints_at_examples: Sequence[int] = (),
    max_bad_steps: int = 10,
    writers: Sequence[str] = (),
    label: str | None = None,
    operative_config: Callable[[], str] = configurables.operative_config,
) -> dict:
    """Trains a decoder on packed text, or goes on where the run in the folder `run` stopped.

    Args:
      run: the run's folder: configuration, metrics, checkpoints, report.
      data: what to train on; its vocabulary sets the model's.
      model: the decoder's shape.
      optimizer: an optax transform; schedules in it are functions of examples seen.
      batch_size: global, in examples: a number, or a policy that moves it.
      total_examples: the length of the run; rounded down to whole microbatches.
      coupling: how the learning rate follows the batch size: "linear", "sqrt", "none".
      base_batch_size: the batch size that the learning rate is meant for; the initial one when None.
      noise_scale: `@gradient_noise_scale()`, to record the gradient noise scale; None: it isn't measured. It is known
        from batches of at least two microbatches, or with `gradient_noise_scale.norm_layers = True` from any.
      mesh: the devices; all of them along `data` when None.
      strategy: what is split along the mesh's axes: a key of `crescendo.parallel.STRATEGIES`, or `@strategy()`.
      seed: of the parameters and of the order of the data.
      initialize_from: a run's folder, or one in Hugging Face's format, whose parameters a fresh run starts from; None:
        random ones.
      max_gradient_norm: clip the mean gradient to this l2 norm; None: never.
      max_microbatch_examples: a bound below the one that memory sets.
      evaluate_every_examples: validate so often, and at the end; None: a fifth of the run.
      evaluation_examples: how many held-out rows.
      checkpoint_every_examples: save so often, and at the end; None: a tenth of the run.
      keep_last_checkpoints: how many of the newest stay.
      keep_checkpoint_every_examples: one so often stays for ever; None: none.
      keep_checkpoints_at_examples: also save at the first step that reaches each of these, and keep it for ever.
      max_bad_steps: stop after so many steps in a row without a finite loss.
      writers: who gets the metrics besides `metrics.jsonl` and TensorBoard, such as ["wandb"] (Weights & Biases).
      label: the run's name in reports; the folder's when None.
      operative_config: gives the configuration text to keep with the run.

    Returns:
      The last validation record: `loss`, `steps`, `examples_seen`, `seconds`, and the rest of `metrics.jsonl`'s.

    Raises:
      UserError: for what the user can mend.
    """
    with user_values():
        policy = constant(batch_size) if isinstance(batch_size, int) else batch_size
    chain = chain_transforms(
        optimizer, policy, noise_scale=noise_scale, coupling=coupling, base_batch_size=base_batch_size
    )
    _check_positive(
        total_examples=total_examples,
        max_gradient_norm=max_gradient_norm,
        base_batch_size=base_batch_size,
        max_microbatch_examples=max_microbatch_examples,
        evaluate_every_examples=evaluate_every_examples,
        evaluation_examples=evaluation_examples,
        checkpoint_every_examples=checkpoint_every_examples,
        keep_last_checkpoints=keep_last_checkpoints,
        keep_checkpoint_every_examples=keep_checkpoint_every_examples,
        max_bad_steps=max_bad_steps,
    )
    if total_examples >= 2**31:
        raise UserError(f"train.total_examples = {total_examples} must be below 2^31, the range of the device's clock")
    if len(data.train) < max(policy.sizes):
        raise UserError(
            f"the corpus has {len(data.train)} rows of {data.sequence_length} tokens, fewer than one batch of "
            f"{max(policy.sizes)}: use a smaller batch_size, a shorter sequence_length, or more text"
        )
    evaluate_every_examples = evaluate_every_examples or max(1, total_examples // 5)
    checkpoint_every_examples = checkpoint_every_examples or max(1, total_examples // 10)
    folder, console = Path(run), Console(quiet=not hosts.is_leader())
    mesh = parallel.make_mesh() if mesh is None else mesh
    device = mesh.devices.flat[0]
    config = decide_model(model, data, mesh)
    if policy.measured_on not in (None, fingerprint(config, data)):
        raise UserError(
            f"the batch-size policy follows what was measured on another model or data (fingerprint "
            f"{policy.measured_on}, not {fingerprint(config, data)}): measure it on this with critical_batch"
        )
    fixed = {
        **({} if initialize_from is None else {"initialize_from": initialize_from}),
        "model": dataclasses.asdict(config),
        "arrays": describe_arrays(config, chain),
        "data": data.fingerprint,
        "seed": seed,
    }
    with user_values():
        parallel.plan_batches(policy.sizes, parallel.Layout(mesh, strategy).batch_shards)
    counter = CompilationCounter()
    use_compilation_cache()
    with contextlib.ExitStack() as stack:
        stack.enter_context(file_access("write", folder))
        stack.enter_context(run_folder.locked(folder))
        before = run_folder.read_info(folder)
        if before is not None:
            run_folder.check_resumable(folder, before["fixed"], fixed)
        compiled = compile_step(
            config,
            chain,
            mesh,
            policy.sizes,
            sequence_length=data.sequence_length,
            strategy=strategy,
            max_gradient_norm=max_gradient_norm,
            max_microbatch_examples=max_microbatch_examples,
            statistics=needed_statistics(config, chain, policy),
        )
        plan = compiled.plan
        total_examples -= total_examples % plan.microbatch_examples
        if total_examples == 0:
            raise UserError(f"train.total_examples is less than one microbatch of {plan.microbatch_examples}: raise it")
        flops_per_token = config.flops_per_token(data.sequence_length)
        peak = hardware.peak_flops_per_second(device)
        peak = peak and peak * mesh.devices.size
        parameters = sum(x.size for x in jax.tree.leaves(compiled.abstract_state.parameters))
        info = (before or run_folder.provenance()) | {
            "name": label or folder.name,
            "parameters": parameters,
            "flops_per_token": flops_per_token,
            "sequence_length": data.sequence_length,
            "total_examples": total_examples,
            "total_tokens": total_examples * data.sequence_length,
            "peak_flops_per_second": peak,
            "step_peak_bytes": compiled.peak_bytes,
            "microbatch_examples": plan.microbatch_examples,
            "fingerprint": fingerprint(config, data),
            "fixed": fixed,
        }
        console.print(f"{data}", highlight=False, soft_wrap=True)
        console.print(
            f"model: {parameters:,} parameters, {flops_per_token / 1e6:,.1f} MFLOPs a token; one step of at most "
            f"{max(policy.sizes)} examples in microbatches of {plan.microbatch_examples} needs "
            f"{compiled.peak_bytes / 2**20:,.0f} MiB on each of {mesh.devices.size} {device.device_kind}",
            highlight=False,
            soft_wrap=True,
        )
        interruption = stack.enter_context(Interruption())
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep_last=keep_last_checkpoints,
            keep_every_examples=keep_checkpoint_every_examples,
            keep_at_examples=keep_checkpoints_at_examples,
        )
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(compiled.abstract_state, report=console.print)
        if restored is None:
            state = trained.fresh_state(config, chain, seed, compiled.abstract_state, initialize_from)
            clock = Clock(batch_size=policy.sizes[0])
        else:
            state, clock = restored
            progress = f"going on at {clock.examples_seen:,} of {total_examples:,} examples in {folder}"
            console.print(progress, highlight=False, soft_wrap=True)
        run_folder.write_info(folder, info, operative_config())
        if hosts.is_leader():
            replace_file(folder / "tokenizer.json", data.tokenizer.to_json().encode())
        observers = run_observers(
            folder,
            resume_at_examples=clock.examples_seen,
            total_examples=total_examples,
            label=info["name"],
            writers=writers,
        )
        stack.callback(observers.close)
        if clock.examples_seen >= total_examples:
            console.print(f"{folder} is complete; to train anew, give another folder with --run", soft_wrap=True)
            return last_validation(folder)
        evaluate = make_evaluation(
            config,
            data.validation,
            compiled.layout,
            compiled.abstract_state.parameters,
            evaluation_examples=evaluation_examples,
            microbatch_examples=plan.microbatch_examples,
        )
        feed = Feed(Stream(data.train, seed), plan, compiled.layout)
        recorder = Recorder(observers, data.sequence_length, flops_per_token, peak, clock.seconds)
        pending: tuple[Clock, int, int, dict] | None = None
        # Before the first step this is the policy's start; after a restart, what the last step's metrics said.
        decided = int(jax.device_get(current_batch_size(state.opt_state)))

        def drain() -> None:
            """Reads the metrics of the step before, and with them the batch size that it decided."""
            nonlocal pending, decided
            if pending is None:
                return
            values = recorder.step(*pending)
            pending, decided = None, values["next_batch_size"]
            if values["skipped_in_a_row"] >= max_bad_steps:
                raise UserError(
                    f"no finite loss and gradient in {max_bad_steps} steps in a row (train.max_bad_steps): stopped at "
                    f"{clock.examples_seen} examples; the checkpoints in {folder} are good: lower the learning rate "
                    "and begin another run, or look for bad rows in the data"
                )

        def save() -> None:
            with jax.transfer_guard("allow"):
                checkpoints.save(state, dataclasses.replace(clock, seconds=recorder.seconds))
            recorder.restart_timer()

        saved_at = clock.examples_seen
        with jax.transfer_guard("disallow"):
            while clock.examples_seen < total_examples and not interruption.requested:
                start = clock.examples_seen
                examples = min(clock.batch_size, total_examples - start)
                state, metrics = compiled.call(state, feed.read(start, examples))
                clock = dataclasses.replace(clock, examples_seen=start + examples, steps=clock.steps + 1)
                drain()
                pending = (clock, examples, plan.microbatches(examples), metrics)
                if decided != clock.batch_size:
                    recorder.batch_size(clock, clock.batch_size, decided, policy.reason)
                    clock = dataclasses.replace(clock, batch_size=decided)

                def due(interval_examples: int, start=start, end=clock.examples_seen) -> bool:
                    return end == total_examples or end // interval_examples > start // interval_examples

                if due(evaluate_every_examples):
                    drain()
                    validation = recorder.validation(clock, evaluate(state.parameters))
                passed = any(start < at <= clock.examples_seen for at in keep_checkpoints_at_examples)
                if due(checkpoint_every_examples) or passed:
                    drain()
                    save()
                    saved_at = clock.examples_seen
            drain()
            if interruption.requested and saved_at < clock.examples_seen:
                save()
        checkpoints.wait()
        run_folder.write_info(folder, info | {"compilations": counter.count}, operative_config())
        if clock.examples_seen < total_examples:
            raise Interrupted(
                f"{interruption.requested}: saved {folder} at {clock.examples_seen:,} of {total_examples:,} examples; "
                "the same command goes on from there"
            )
        return validation


def last_validation(folder: Path) -> dict:
    """The newest validation record of a run."""
    return [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "validation"][-1]


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise UserError(f"train.{name} = {value} must be above 0")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = configurables.parser("Train a decoder on packed text.", EXAMPLES)
    parser.add_argument("--run", help="the run's folder (default: runs/NAME of the last config)")
    parser.add_argument(
        "--hosts",
        metavar="auto|HOST:PORT,INDEX,COUNT",
        help="be one of several processes that share the run's folder: as JAX finds by itself (SLURM, Cloud TPU, ...), "
        "or by process 0's address, this process's number and how many there are",
    )
    parser.add_argument(
        "--join-seconds", type=float, default=300.0, help="how long to wait for the other processes (default 300)"
    )
    arguments = parser.parse_args(argv)
    if arguments.hosts:
        with user_values():
            hosts.join(arguments.hosts, timeout_seconds=arguments.join_seconds)
    configs = arguments.config or ["debug.gin"]
    bound = configurables.bind(train, configs, arguments.set)
    with hosts_lost():
        bound(run=arguments.run or f"runs/{Path(configs[-1]).stem}")


if __name__ == "__main__":
    run_command(main)

"""What a config may name, the loop can run: every optimizer, transform, schedule and policy, by the loop's own step.

Names are found in the tables that configs read; a new one is tested by being there.
"""

import inspect
import json

import jax
import numpy as np
import pytest

from crescendo import optim, parallel
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.factories import FACTORIES
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.session import Session, session_options
from crescendo.experiments.trainer.training import make_recorder, train

STEPS = 4
MESHES = {
    "one device": {"data": 1},
    "fsdp 2, data 2": {"fsdp": 2, "data": 2},
    "tensor 2, data 2": {"tensor": 2, "data": 2},
}
# What required parameters get, by their names; `CURVE` and `REFINED` are files.
VALUES = {
    "learning_rate": "1e-3",
    "peak": "1e-3",
    "cooldown": "32",
    "start": "8",
    "cap": "16",
    "end": "16",
    "warmup_examples": "16",
    "batch_size": "16",
    "sizes": "[8, 16]",
    "curve": "CURVE",
    "path": "REFINED",
    "sequence_length": "32",
    "examples": "64",
    "optimizer": "@adamw()",
    "transforms": "[@gradient_noise_scale(), @adamw()]",
}
# Where a required argument is one of several to choose from.
FURTHER = {"staged": ["staged.starts_examples = [0, 32]"], "refined": [], "lars": ["lars.trust_coefficient = 0.02"]}
POLICIES = FACTORIES["optim.policies"] | FACTORIES["optim.batch_size"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """What is read from a file: a curve of critical batch sizes, and a refined schedule."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "curve.json").write_text(json.dumps({"tokens": [0, 1000], "critical_batch_size": [8.0, 80.0]}))
    optim.save_refined(folder / "refined.json", np.linspace(1, 2, 8))
    return {"CURVE": repr(str(folder / "curve.json")), "REFINED": repr(str(folder / "refined.json"))}


@pytest.fixture(scope="module")
def conforms(small_bindings, files, quick_compilation):
    """`conforms(name, factory, *bindings, mesh=...)`: trains a few steps with the factory's required values bound."""

    def call(name: str, factory, *bindings: str, mesh: str = "one device") -> dict:
        required = required_bindings(name, factory, files)
        every = [*small_bindings, "model.kv_heads = 2", *required, *bindings]
        configurables.bind(train, ["debug.gin"], own=every)
        sizes = MESHES[mesh]
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        options = session_options(configurables.arguments(train)) | {
            "mesh": parallel.make_mesh(**sizes, devices=devices)
        }
        return steps_of(Session(**options))

    return call


def required_bindings(name: str, factory, files: dict[str, str]) -> list[str]:
    """What a config must say of a factory, by the names of its parameters."""
    bindings = []
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.name in VALUES, f"say in VALUES what a config gives {name}.{parameter.name}"
            value = VALUES[parameter.name]
            bindings.append(f"{name}.{parameter.name} = {files.get(value, value)}")
    return bindings + FURTHER.get(name, [])


def steps_of(session: Session) -> dict:
    """The last record of a few steps, in which everything stayed finite and the parameters moved."""
    records: list[dict] = []
    state = session.fresh_state()
    first = jax.device_get(state.parameters)
    state, clock = loop.run(
        session,
        state,
        Clock(batch_size=session.policy.sizes[0]),
        end=STEPS * session.policy.sizes[0],
        recorder=make_recorder(session, records.append),
    )
    assert clock.steps >= STEPS - 1  # a batch may have grown
    assert int(state.skipped_steps) == 0, records
    assert np.isfinite([record["loss"] for record in records if record["kind"] == "train"]).all()
    leaves = jax.device_get(jax.tree.leaves(state.parameters))
    assert all(np.isfinite(x).all() for x in leaves)
    assert any((x != y).any() for x, y in zip(leaves, jax.tree.leaves(first), strict=True))
    return next(record for record in reversed(records) if record["kind"] == "train")


# A quick run compiles all schedules together, all transforms together and most optimizers together, and alone what does
# more than change an update; `make test-slow` takes every name alone on every mesh.
QUICK = {
    ("schedule_free", "one device"),  # evaluates elsewhere
    ("norm_test", "one device"),  # wants several microbatches, and statistics of them
}


# Of a chain of many rules a few parameters show as much: stacked matrices, a table, and a vector.
FEW_PARAMETERS = [
    "train.groups = [@mlp/group(), @table/group(), @norm/group(), @rest/group()]",
    "mlp/group.path = 'blocks/mlp/up/*'",
    "table/group.path = 'embedding/*'",
    "norm/group.path = 'final_norm/*'",
    "rest/group.path = '*'",
    "rest/group.frozen = True",
]


def cases(names, quick=lambda name, mesh: (name, mesh) in QUICK):
    return [
        pytest.param(name, mesh, marks=() if quick(name, mesh) else pytest.mark.slow)
        for name in names
        for mesh in MESHES
    ]


def never(name, mesh):
    return False


@pytest.mark.parametrize(("name", "mesh"), cases(optim.OPTIMIZERS))
def test_every_optimizer(name, mesh, conforms):
    conforms(name, optim.OPTIMIZERS[name], f"train.optimizer = @{name}()", mesh=mesh)


def test_all_optimizers_in_one_chain(conforms, files):
    """One behind the other but for those that must stand alone: a step compiled once runs the rule of each."""
    alone = {"schedule_free", "sophia"}  # one evaluates elsewhere, the other wants second derivatives
    names = [name for name in optim.OPTIMIZERS if name not in alone]
    required = [binding for name in names for binding in required_bindings(name, optim.OPTIMIZERS[name], files)]
    chain = f"optim.chain.transforms = [{', '.join(f'@{name}()' for name in names)}]"
    conforms("train", lambda: None, "train.optimizer = @optim.chain()", chain, *required, *FEW_PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_every_optimizer_under_the_shipped_schedule(name, conforms):
    """With its warmup, whose first rates are small."""
    if "learning_rate" in inspect.signature(optim.OPTIMIZERS[name]).parameters:
        bindings = [f"train.optimizer = @{name}()", f"{name}.learning_rate = @schedules.linear()"]
        conforms(name, optim.OPTIMIZERS[name], *bindings)


@pytest.mark.parametrize(("name", "mesh"), cases(optim.TRANSFORMS | optim.COMBINATORS, never))
def test_every_transform(name, mesh, conforms):
    """Before an SGD, or instead of an optimizer where it makes one."""
    factory = (optim.TRANSFORMS | optim.COMBINATORS)[name]
    chained = [
        "train.optimizer = @optim.chain()",
        f"optim.chain.transforms = [@{name}(), @sgd()]",
        "sgd.learning_rate = 1e-3",
    ]
    alone = [f"train.optimizer = @{name}()", "adamw.learning_rate = 1e-3"]
    conforms(name, factory, *(alone if name in optim.COMBINATORS else chained), mesh=mesh)


@pytest.mark.parametrize(("name", "mesh"), cases(optim.SCHEDULES, never))
def test_every_schedule(name, mesh, conforms):
    record = conforms(
        f"schedules.{name}" if name != "refined" else name,
        optim.SCHEDULES[name],
        "train.optimizer = @sgd()",
        f"sgd.learning_rate = @{'' if name == 'refined' else 'schedules.'}{name}()",
        mesh=mesh,
    )
    assert record["learning_rate"] > 0


@pytest.mark.parametrize("guard", optim.GUARDS)
def test_all_transforms_in_one_chain(conforms, guard):
    """Behind one of optax's, and under a guard."""
    names = [name for name in optim.TRANSFORMS if name != "scale_by_learning_rate"]
    transforms = ", ".join(f"@{name}()" for name in ("optax.clip_by_global_norm", *names))
    bindings = [f"optim.chain.transforms = [{transforms}, @average_weights()]", "average_weights.optimizer = @sgd()"]
    bindings += ["average_weights.examples = 64", "sgd.learning_rate = 1e-3", "train.optimizer = @optim.chain()"]
    bindings += ["optax.clip_by_global_norm.max_norm = 0.5", f"train.guard = @{guard}()"]
    assert conforms(guard, optim.GUARDS[guard], *bindings, *FEW_PARAMETERS)["skipped_steps"] == 0


def test_all_schedules_in_one_step(conforms, files):
    """One behind the other, each by its own name, so that all of them are read at the step's clock and length."""
    transforms, bindings = [], []
    for name, factory in optim.SCHEDULES.items():
        qualified = name if name == "refined" else f"schedules.{name}"
        transforms.append(f"@{name}/scale_by_learning_rate()")
        bindings.append(f"{name}/scale_by_learning_rate.learning_rate = @{qualified}()")
        bindings += required_bindings(qualified, factory, files)
        # The rates multiply: peaks of 1 keep the update within what float32 can add to a parameter.
        bindings += [f"{qualified}.peak = 1.0"] if "peak" in inspect.signature(factory).parameters else []
    chain = ["train.optimizer = @optim.chain()", f"optim.chain.transforms = [{', '.join(transforms)}]"]
    record = conforms("train", lambda: None, *chain, *bindings, *FEW_PARAMETERS)
    rates = [value for name, value in record.items() if name.startswith("learning_rate")]
    assert len(rates) == len(optim.SCHEDULES)
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize(("name", "mesh"), cases(POLICIES))
def test_every_batch_size_policy(name, mesh, conforms):
    qualified = f"batch_size.{name}" if name == "constant" else name
    conforms(qualified, POLICIES[name], f"train.batch_size = @{qualified}()", mesh=mesh)


@pytest.mark.parametrize(("name", "mesh"), cases(optim.GUARDS, never))
def test_every_guard(name, mesh, conforms):
    record = conforms(name, optim.GUARDS[name], f"train.guard = @{name}()", mesh=mesh)
    assert record["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        ["train.optimizer = @optax.contrib.dog()"],
        ["train.optimizer = @optax.contrib.muon()", "optax.contrib.muon.learning_rate = 1e-3"],
        [
            "train.optimizer = @optax.adamw()",
            "optax.adamw.learning_rate = @optax.linear_schedule()",
            "optax.linear_schedule.init_value = 1e-3",
            "optax.linear_schedule.end_value = 1e-4",
            "optax.linear_schedule.transition_steps = 8",
        ],
        [
            "train.optimizer = @optim.chain()",
            "optim.chain.transforms = [@optax.clip_by_global_norm(), @lion()]",
            "optax.clip_by_global_norm.max_norm = 0.5",
            "lion.learning_rate = @schedules.linear()",
        ],
    ],
    ids=["dog", "muon", "adamw by a schedule of optax's", "chain"],
)
def test_whatever_optax_has(optimizer, conforms):
    conforms("train", lambda: None, *optimizer)


def masked_adamw():
    import optax

    return optax.masked(optim.adamw(1e-3), lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


def partitioned():
    import optax

    labels = lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 2 else "rest", params)  # noqa: E731
    return optax.partition({"matrix": optim.muon(1e-3), "rest": optim.adamw(1e-3)}, labels)


def injected():
    import optax

    return optax.inject_hyperparams(optim.adamw)(learning_rate=1e-3)


@pytest.mark.parametrize(
    ("make", "mesh"),
    cases([masked_adamw, partitioned, injected], never),
)
def test_states_however_nested(make, mesh, small_bindings, quick_compilation):
    configurables.bind(train, ["debug.gin"], [*small_bindings, "model.kv_heads = 2"])
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    options = session_options(configurables.arguments(train)) | {"optimizer": make()}
    session = Session(**options | {"mesh": parallel.make_mesh(**sizes, devices=devices)})
    steps_of(session)
    if sizes.get("fsdp", 1) > 1:  # moments are split like their parameters, however deep they lie
        moments = [x for x in jax.tree.leaves(session.abstract_state.opt_state) if x.ndim > 2]
        assert moments
        assert all(x.sharding.shard_shape(x.shape) != x.shape for x in moments)

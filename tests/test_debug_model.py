"""The shipped debug model trains as it did: a change that only rearranges code moves none of these figures.

`python tests/test_debug_model.py` writes them anew, for a change that is meant to move them. On one machine they repeat
to the bit; on another processor the compiler may add in another order, hence the tolerance.
"""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runs.state import Clock
from crescendo.experiments.trainer import loop
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.training import make_recorder
from crescendo.models import ModelConfig

FIGURES = Path(__file__).parent / "debug_model.json"


def debug_session() -> Session:
    """The debug model on one CPU."""
    return Session(
        data=RandomText(257, 32),
        model=ModelConfig.preset("debug"),
        optimizer=optim.adamw(optim.schedules.linear(1e-3, warmup=64), weight_decay=0.1),
        batch_size=8,
        total_examples=320,
        mesh=parallel.make_mesh(devices=jax.devices()[:1]),
    )


def forty_steps(session: Session) -> dict:
    """The loss of every step, and the sum of the parameters' magnitudes behind the last."""
    records: list[dict] = []
    state, _ = loop.run(
        session,
        session.fresh_state(),
        Clock(batch_size=8),
        end=320,
        recorder=make_recorder(session, records.append),
    )
    losses = [record["loss"] for record in records]
    return {"losses": losses, "parameters_l1_norm": float(optax.tree.norm(state.parameters, ord=1))}


@pytest.fixture(scope="module")
def session(quick_compilation):
    return debug_session()


def test_forty_steps_are_what_they_were(session):
    known, found = json.loads(FIGURES.read_text()), forty_steps(session)
    print("the same bits" if found == known else "other bits")
    np.testing.assert_allclose(found["losses"], known["losses"], rtol=1e-5)
    assert found["parameters_l1_norm"] == pytest.approx(known["parameters_l1_norm"], rel=1e-5)


def test_a_step_keeps_to_its_budget(session, within_budget):
    cost, memory = session.step.cost_analysis(), session.step.memory_analysis()
    within_budget(
        "debug on one CPU",
        flops=int(cost["flops"]),
        bytes_accessed=int(cost["bytes accessed"]),
        temporary_bytes=memory.temp_size_in_bytes,
    )


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(forty_steps(debug_session()), indent=1) + "\n")

"""What a language model writes while it trains."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import MinLen

from crescendo import optim
from crescendo.experiments.runs.generation import generate, stream
from crescendo.experiments.runs.state import Clock, TrainState
from crescendo.experiments.runs.trained import Trained
from crescendo.experiments.runtime import hardware
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.trainer.microbatches import MEMORY_SHARE
from crescendo.experiments.trainer.probes import Probe
from crescendo.experiments.trainer.session import Session
from crescendo.ranges import Count


@checked
def samples(every_examples: Count, prompts: Annotated[Sequence[str], MinLen(1)] = ("",), tokens: Count = 64) -> Probe:
    """How the model goes on from some texts, in records of the kind `sample` with `prompt` and `text`.

    Tokens are drawn from the model's own distribution, by keys that are functions of the clock and the prompt's place:
    a resumed run writes the same. Over several devices the parameters are brought to the first one for it.

    Args:
      every_examples: how often, at least 1; at the end too.
      prompts: each a document's begin, so that an empty one gives a document from its first token; two equal ones are
        continued differently.
      tokens: at most so many behind each.

    Raises:
      UserError: a number below 1, or no prompts; when the run is assembled, for another task than a language model,
        several processes, or no room for the parameters on one device.

    >>> samples(1024, prompts=["Once"]).every_examples
    1024
    """

    def prepare(session: Session):
        _check(session)
        task: Any = session.task
        device = session.layout.mesh.devices.flat[0]

        def call(clock: Clock, state: TrainState) -> list[dict[str, str]]:
            averages = optim.has_evaluation_params(state.opt_state)
            parameters = jax.device_put(session.averaged(state) if averages else state.parameters, device)
            model = Trained(task.config, parameters, task.data.tokenizer, task.units_per_example, clock.examples_seen)
            texts = []
            for place, prompt in enumerate(prompts):
                drawn = generate(model, prompt, tokens=tokens, seed=clock.examples_seen + place)
                texts.append({"prompt": prompt, "text": "".join(stream(model, prompt, drawn))})
            return texts

        return call

    return Probe(every_examples, None, "sample", prepare)


def _check(session: Session) -> None:
    """That the run's model can write, on one device."""
    task, mesh = session.task, session.layout.mesh
    if task.name != "language_model" or getattr(task.data, "tokenizer", None) is None:
        raise UserError(f"train.probes: the task {task.name} writes no text: leave @samples() out")
    if jax.process_count() > 1:
        raise UserError("train.probes: @samples() needs a run of one process: use crescendo generate afterwards")
    limit, copied = hardware.memory_bytes(mesh.devices.flat[0]), 0
    if mesh.size > 1:
        copied = sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(session.parameters))
    if limit is not None and session.peak_bytes + copied > MEMORY_SHARE * limit:
        raise UserError(
            f"train.probes: @samples() needs all parameters, {copied / 2**30:.1f} GiB, on one device beside the step, "
            "which has no room for them: use crescendo generate afterwards"
        )

"""A run's programs are compiled while its data are prepared, and what isn't as was expected changes nothing."""

import threading

import jax
import pytest

from crescendo import optim, parallel
from crescendo.experiments.data.documents import Documents
from crescendo.experiments.data.text_data import text_data
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.language_model import LanguageModel, language_model
from crescendo.experiments.trainer import ahead
from crescendo.experiments.trainer.programs import CompiledStep, Programs
from crescendo.experiments.trainer.session import Session
from crescendo.experiments.trainer.wall_clock import StartClock
from crescendo.models import ModelConfig

MODEL = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
TEXTS = [f"the {word} of document {i} is a text" for i, word in enumerate(["begin", "middle", "end"] * 70)]


def options(cache, tokenizer="bytes", read=None, task=language_model):
    documents = Documents("a corpus", "of texts", read or (lambda: (text.encode() for text in TEXTS)))
    data = text_data(documents, tokenizer=tokenizer, sequence_length=16, cache_directory=cache)
    rest = {"model": MODEL, "optimizer": optim.adamw(1e-3), "batch_size": 8, "total_examples": 64}
    return rest | {"data": data, "task": task}


class Asked(list):
    def __init__(self):
        super().__init__()
        self.some = threading.Event()


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of compiling a step, says what it would be of; gives the sessions that were asked, as they come."""
    asked = Asked()

    def compile_step(self):
        asked.append(self)
        asked.some.set()
        return CompiledStep(next(self.plans()), 64, self.task.config, {}, ())

    monkeypatch.setattr(Session, "_compile_step", compile_step)
    monkeypatch.setattr(Session, "compile_others", lambda self, evaluation_examples: None)
    return asked


def prepared_session(options):
    return ahead.prepared_session(options, 8, StartClock())


def test_an_optimizer_without_its_derivatives_is_refused_before_the_data_are_read(tmp_path):
    mesh = parallel.make_mesh(data=1, stage=2, devices=jax.devices()[:2])
    given = options(tmp_path, read=lambda: pytest.fail("the corpus was read"))
    with pytest.raises(UserError, match=r"mesh stage = 2: a pipeline has no second derivatives, .*: use stage = 1"):
        prepared_session(given | {"optimizer": optim.sophia(1e-3), "mesh": mesh})


def test_what_was_compiled_for_expected_data_serves_the_data(tmp_path, stand_in):
    def read():
        assert stand_in.some.wait(60)  # the corpus isn't read before the step is compiled
        return (text.encode() for text in TEXTS)

    given = options(tmp_path, read=read)
    session = prepared_session(given)
    assert session.step.vocab_size == session.task.config.vocab_size == 384
    (early,) = stand_in
    assert early is not session
    assert early.task.data is not session.task.data is given["data"]
    # What is there already is opened, and nothing done ahead.
    again = prepared_session(options(tmp_path))
    assert again.programs is not session.programs
    assert again.task.fingerprint == session.task.fingerprint


def test_a_tokenizer_smaller_than_expected_is_compiled_for_anew(tmp_path, stand_in):
    session = prepared_session(options(tmp_path, tokenizer="bpe:900"))
    assert session.task.data.vocab_size < 512
    assert session.step.vocab_size == session.task.config.vocab_size == 512
    assert stand_in[-1] is session


def test_a_task_that_reads_rows_waits_for_them(tmp_path, stand_in):
    class Reading(LanguageModel):
        def __init__(self, data, model):
            super().__init__(data, model)
            self.seen = len(data.train)

    session = prepared_session(options(tmp_path, task=Reading))
    assert session.task.seen > 0
    assert session.step.vocab_size == 384
    assert [each for each in stand_in if isinstance(each.task, Reading)] == [session]


def test_under_settings_that_other_threads_lack_nothing_is_compiled_in_them(tmp_path, stand_in):
    with jax.default_matmul_precision("highest"):
        session = prepared_session(options(tmp_path / "precision"))
        ahead.begin_compiling(session, 8)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        prepared_session(options(tmp_path / "mesh"))
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(60)
    assert stand_in == []
    assert session.step.vocab_size == 384


def test_what_is_wrong_with_the_data_or_the_options_is_said_as_ever(tmp_path, stand_in):
    with pytest.raises(UserError, match="a corpus is empty"):
        prepared_session(options(tmp_path, read=lambda: iter(())))
    with pytest.raises(UserError, match=r"batch_size = 0 must be at least 1"):
        prepared_session(options(tmp_path) | {"batch_size": 0})


def test_a_program_that_failed_is_tried_again_by_whoever_asks():
    programs, tried = Programs(), []

    def fails():
        tried.append("fails")
        raise UserError("no memory")

    for _ in range(2):
        with pytest.raises(UserError, match="no memory"):
            programs.get("step", fails)
    assert programs.get("step", lambda: "compiled") == "compiled" == programs.get("step", fails)
    assert tried == ["fails"] * 2


def test_a_program_is_compiled_once_by_several_threads():
    programs, compiling, release, compiled = Programs(), threading.Event(), threading.Event(), []

    def compile():
        compiling.set()
        assert release.wait(60)
        compiled.append("once")
        return len(compiled)

    results = []
    threads = [threading.Thread(target=lambda: results.append(programs.get("step", compile))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert compiling.wait(60)
    release.set()
    for thread in threads:
        thread.join(60)
    assert results == [1] * 4

"""The commands under one name, their help, and the shell's completion of them."""

import contextlib
import importlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from crescendo.experiments import __main__ as commands
from crescendo.experiments import papers, train
from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runtime import cli
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.interruption import TIME_IS_UP, Interrupted, Interruption
from crescendo.experiments.trainer import training

# What users have typed since the first version: none of them goes.
KEPT = {
    *("train", "report", "sweep", "generate", "export", "import_hf", "evaluate", "describe", "doctor", "benchmark"),
    *("batch_warmup", "critical_batch", "refine_schedule", "large_batch"),
    *("bench_kernels", "tune_kernels", "plot_schedules"),
}


def test_no_command_has_lost_its_name():
    assert set(commands.commands()) >= KEPT
    rooms = {path.parent.name for path in Path(commands.__file__).parent.glob("*/__init__.py")}
    assert not set(papers.names()) & (KEPT - set(papers.names()) | rooms), "a paper has the name of a command or a room"
    for name in KEPT - set(commands.ELSEWHERE):
        assert importlib.util.find_spec(f"crescendo.experiments.{name}") is not None


@pytest.mark.parametrize("name", commands.commands())
def test_every_command_says_what_it_does_and_has_examples_in_its_help(name: str):
    command = commands.commands()[name]
    assert 10 < len(command.does) < 80
    assert "\n" not in command.does
    parser = importlib.import_module(command.module).parser()
    text = parser.format_help()
    assert "example" in text
    assert "python -m crescendo." in text or f"crescendo {name}" in text
    for action in parser._actions:
        assert action.help or action.metavar or action.choices, action  # nothing is left to guess


def test_listing_the_commands_imports_none():
    program = """
import sys
from crescendo.experiments.__main__ import commands
heavy = {command.module for command in commands().values()} | {"crescendo.optim", "crescendo.pallas_kernels"}
sys.exit(bool(heavy & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_command_gets_the_arguments_behind_its_name(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["sweep", "--help"])
    assert stopped.value.code == 0
    assert "--search" in capsys.readouterr().out


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["trian"])
    assert stopped.value.code == 2
    assert "critical_batch" in capsys.readouterr().err


def complete(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    listed = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{' '.join(words)}'; "
        "COMP_POINT=${#COMP_LINE}; $(complete -p crescendo | sed 's/.*-F \\([^ ]*\\).*/\\1/') crescendo "
        f"'{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture):
    commands.main(["completion", "bash"])
    script = tmp_path / "crescendo"
    script.write_text(capsys.readouterr().out)
    assert {"train", "sweep", "report", "completion"} <= set(complete(script, "crescendo", ""))
    assert complete(script, "crescendo", "crit") == ["critical_batch"]
    assert complete(script, "crescendo", "sweep", "--lau") == ["--launcher"]
    assert set(complete(script, "crescendo", "sweep", "--launcher", "")) >= {"local", "ray", "slurm"}


def test_ctrl_c_outside_of_a_loop_is_one_line(capsys: pytest.CaptureFixture):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ("interrupted; what was saved is kept, and the same command goes on from there\n")


def stopped(reason: str) -> None:
    with Interruption() as interruption:
        if reason in signal.Signals.__members__:
            signal.raise_signal(signal.Signals[reason])
        raise Interrupted("saved", interruption.requested or reason)


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 143), (TIME_IS_UP, None)])
def test_a_command_that_a_signal_stopped_says_so_by_its_exit_code(reason, code, capsys: pytest.CaptureFixture):
    # In a process the second of these signals would end it.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) if code else contextlib.nullcontext() as told:
        patch.setattr(cli, "ctrl_c_ends", contextlib.nullcontext)
        # As runs are called: gin has exceptions of its own.
        run_command(lambda: configurables.bind(stopped, [])(reason=reason))
    assert (told.value.code if code else None) == code
    assert capsys.readouterr().out == "saved\n"


# Inside of C the main thread doesn't come to Python's handlers, as in a compilation.
BUSY = """
import hashlib, sys
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.interruption import Interruption

def main():
    with Interruption():
        print("begins", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

run_command(main)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_ends_at_once_whatever_is_going_on(first: int):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begins\n"
        process.send_signal(first)
        with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for a place to go on from
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
        process.communicate()


# An import that is cut short says a page, and one of an extension module may go on.
IMPORTING = """
import builtins
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where these tests are behind nohup

ours = builtins.__import__

def swallowing(name, *args, **kwargs):
    if name == "shtab":
        print("begins", flush=True)
        try:
            import time
            time.sleep(60)
        except KeyboardInterrupt:
            print("lost", flush=True)
    return ours(name, *args, **kwargs)

builtins.__import__ = swallowing
sys.argv = ["crescendo", "completion", "bash"]
from crescendo.experiments import run
run()
"""


def test_ctrl_c_is_heard_while_modules_are_imported():
    process = subprocess.Popen([sys.executable, "-c", IMPORTING], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout.readline() == b"begins\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == (b"", None)
        assert process.returncode == -signal.SIGINT  # 130, says the shell
    finally:
        process.kill()
        process.communicate()


def test_usage_begins_with_what_was_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/crescendo"])
    with pytest.raises(SystemExit):
        commands.main(["export", "runs/first"])
    assert capsys.readouterr().err.startswith("usage: crescendo export [-h]")


def test_a_config_of_a_run_goes_to_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert train.default_run([str(tmp_path / "first" / "config.gin")]) == "runs/first-again"
    assert train.default_run(["debug.gin", str(tmp_path / "second" / "config.gin")]) == "runs/second-again"
    monkeypatch.chdir(tmp_path / "first")
    assert train.default_run(["config.gin"]) == "runs/first-again"
    assert train.default_run(["configs/config.gin"]) == "runs/config"


FOLDERS = {"run", "runs", "folder", "out"}


@pytest.mark.parametrize("name", sorted(set(commands.commands()) - set(commands.ELSEWHERE)))
def test_addresses_of_object_stores_are_refused_as_they_are_typed(name: str):
    parser = importlib.import_module(commands.commands()[name].module).parser()
    for action in (each for each in parser._actions if each.dest in FOLDERS and each.type is not int):
        for address in ("gs://bucket/run", "s3://bucket/run", "gs:/bucket"):
            with pytest.raises(UserError, match=f"{address} is no path of this machine's"):
                parser._get_value(action, address)
        assert str(parser._get_value(action, "runs/a=1:b")) == "runs/a=1:b"


@pytest.mark.parametrize("setting", ["run", "train.initialize_from", "train.start_from", "text_data.cache_directory"])
def test_addresses_of_object_stores_are_refused_before_anything_is_made(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "s3://bucket/run@64" if setting == "train.start_from" else "s3://bucket/run"
    given = [] if setting == "run" else [f"{setting} = {address!r}"]
    run = address if setting == "run" else "run"
    with pytest.raises(UserError, match=f"^{address} is no path of this machine's: .* mount the bucket"):
        configurables.bind(training.train, ["debug.gin"], given)(run=run)
    assert not list(tmp_path.iterdir())


def test_what_is_captured_has_no_escapes_even_where_a_notebook_asks_for_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "")  # put back afterwards
    monkeypatch.delenv("TTY_COMPATIBLE")
    run_command(lambda: Console().print("[bold]loss"))
    assert capsys.readouterr().out == "loss\n"

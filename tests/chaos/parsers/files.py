"""Readers of what runs, papers and others leave: curves, schedules, results, runs and their reports, models, tiles."""

import contextlib
import dataclasses
import json
import math
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import optuna
from fuzz import Parser
from rich.console import Console
from safetensors.numpy import save_file

from crescendo import models
from crescendo.experiments.papers.critical_batch import Branch, BranchRecord
from crescendo.experiments.papers.critical_batch.curve import make_curve
from crescendo.experiments.papers.large_batch import Cell, CellRecord
from crescendo.experiments.papers.large_batch.recipes import TASKS
from crescendo.experiments.papers.large_batch.results import summarize
from crescendo.experiments.papers.refine_schedule import recorded_norms
from crescendo.experiments.reports import plots, seconds
from crescendo.experiments.reports.compare import arms_table, compare, headline
from crescendo.experiments.reports.equal_loss import equal_loss_table
from crescendo.experiments.reports.held_out import held_out_table
from crescendo.experiments.reports.write import write_arms
from crescendo.experiments.runs import hf, trained
from crescendo.experiments.runs.info import read_info
from crescendo.experiments.runs.results import Results
from crescendo.experiments.runs.run import is_complete, read_run
from crescendo.experiments.runtime.errors import user_values
from crescendo.experiments.runtime.files import to_json
from crescendo.experiments.sweeps.points import spaces
from crescendo.experiments.sweeps.search import open_study
from crescendo.experiments.trainer.starting import stored_shapes
from crescendo.models import ModelConfig
from crescendo.optim.policies import critical_batch_following
from crescendo.optim.refinement import refined, save_refined
from crescendo.pallas_kernels import tiles


def _is_number(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _increases(values: Any) -> bool:
    return bool((np.diff(np.asarray(values, np.float64)) > 0).all())


def _written(path: Path, content: Any) -> Path:
    path.write_bytes(to_json(content))
    return path


# What runs measured.

CURVE = {
    "tokens": [1280, 2560, 5120],
    "critical_batch_size": [4.0, 16.0, 45.25],
    "interval": [[4.0, None], [8.0, 32.0], [32.0, 64.0]],
    "fingerprint": "ab12",
    "settings": {"batch_size": 4, "factors": [1, 2, 4]},
    "points": [{"examples": 10}],
}


def _read_curve(path: Path) -> None:
    with user_values():
        policies = [critical_batch_following(path, 4, 64, sequence_length=8, lower_bound=low) for low in (False, True)]
    for policy in policies:
        assert set(policy.sizes) <= {4, 8, 16, 32, 64}
    content = json.loads(path.read_text("utf-8-sig"))
    assert content.keys() <= CURVE.keys()
    assert all(_is_number(value, 0) for name in ("tokens", "critical_batch_size") for value in content[name])
    assert _increases(content["tokens"])
    assert len(content["tokens"]) == len(content["critical_batch_size"]) == len(content["interval"])
    for value, (low, high) in zip(content["critical_batch_size"], content["interval"], strict=True):
        assert low * 0.999 <= value <= (math.inf if high is None else 1.001 * high)
    assert isinstance(content.get("fingerprint"), str | None)


def _refined_samples(folder: Path) -> list[Path]:
    save_refined(folder / "refined.json", [3.0, 2.0, 1.0, 1.0, 2.0], norm="l2", smoothing=0.0)
    return [folder / "refined.json"]


def _read_refined(path: Path) -> None:
    with user_values():
        refined(0.5, 100, path=path, warmup=10)
    content = json.loads(path.read_text("utf-8-sig"))
    assert content.keys() <= {"fractions", "multipliers", "norm", "smoothing"}
    assert all(_is_number(value, 0) and value <= 1 for name in ("fractions", "multipliers") for value in content[name])
    assert _increases(content["fractions"])
    assert (content["fractions"][0], content["fractions"][-1], max(content["multipliers"])) == (0, 1, 1)
    assert len(content["fractions"]) == len(content["multipliers"])


# Lists of results.

BRANCHES = [
    {"seed": 0, "examples": examples, "factor": k, "losses": [2.0 + 0.01 * k] * 7 + [None if k == 4 else 2.0]}
    for examples in (16, 32)
    for k in (1, 2, 4)
]
SETTINGS = {
    "batch_size": 4,
    "sequence_length": 8,
    "tolerance": 0.01,
    "fingerprint": "f",
    "factors": [1, 2, 4],
    "seeds": 1,
}


def _branch_samples(folder: Path) -> list[Path]:
    path = folder / "branches.jsonl"
    path.write_bytes(b"".join(map(to_json, BRANCHES)))
    return [path]


def _read_branches(path: Path) -> None:
    records = list(Results(path.parent, path.name, Branch, BranchRecord).records.values())
    for record in records:
        assert _is_whole(record["seed"])
        assert _is_whole(record["examples"], 1)
        assert _is_whole(record["factor"], 1)
        assert all(loss is None or _is_number(loss) for loss in record["losses"])
    curve = make_curve(records, SETTINGS)
    assert _increases(curve["tokens"])
    assert all(_is_number(value, 1) for value in curve["critical_batch_size"])


def _cell_samples(folder: Path) -> list[Path]:
    run = dict.fromkeys(("first_loss", "train_loss", "validation_loss", "test_loss"), 1.5)
    run |= {"validation_accuracy": 0.5, "test_accuracy": 0.25, "learning_rate": 1e-3}
    cells = [
        {
            **{"optimizer": "adamw", "batch_size": size, "seed": seed, "steps": 8, "seconds": 1.5, "device": "cpu"},
            "runs": [run | {"multiplier": m, "test_loss": None if m == 2 else 1.0} for m in (1.0, 2.0)],
        }
        for size in (8, 16)
        for seed in (0, 1)
    ]
    path = folder / "cells.jsonl"
    path.write_bytes(b"".join(map(to_json, cells)))
    return [path]


def _read_cells(path: Path) -> None:
    records = Results(path.parent, path.name, Cell, CellRecord).records
    asked = [records[cell] for size in (8, 16) for seed in (0, 1) if (cell := Cell("adamw", size, seed)) in records]
    asked = [record for record in asked if [run["multiplier"] for run in record["runs"]] == [1.0, 2.0]]
    for record in asked:
        assert _is_whole(record["steps"], 1)
        assert _is_number(record["seconds"], 0)
        for run in record["runs"]:
            assert all(value is None or _is_number(value) for value in run.values())
    if asked:
        summary = summarize(asked, TASKS["images"], {"multipliers": [1.0, 2.0]})
        assert all(point["accuracy"] is None or 0 <= point["accuracy"] <= 1 for point in summary["points"])


# Runs and their reports.

MODEL = ModelConfig(vocab_size=96, width=8, layers=2, heads=2, kv_heads=1, mlp_width=12, qk_norm=True, head_width=4)
INFO = {
    **{"format": 2, "name": "a run", "unit": "token", "parameters": 1000, "flops_per_token": 6e3},
    **{"sequence_length": 8, "total_examples": 160, "total_tokens": 1280, "peak_flops_per_second": None},
    **{"step_peak_bytes": 1 << 20, "microbatch_examples": 4, "fingerprint": "ab", "ended": None, "compilations": 2},
    **{"started": "2026-01-01T00:00:00+00:00", "git_commit": None, "versions": {"jax": "0.11"}, "device": "1 x cpu"},
    "fixed": {
        **{"task": "language_model", "model": MODEL.identity, "data": "cd", "seed": 0},
        "arrays": {".parameters['a']": "float32[8, 4]", ".parameters['b']": "float32[]", ".skipped_steps": "int32[]"},
    },
}


def _records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, 21):
        place = {"step": step, "examples_seen": 8 * step, "tokens_seen": 64 * step}
        row = {"loss": 3.0 / step, "learning_rate": 1e-3, "gradient_norm": 1.0, "gradient_l1_norm": 9.0}
        row |= {"skipped_steps": int(step > 9), "noise_scale": None if step < 3 else 4.5, "batch_size": 8}
        row |= {"microbatches": 2, "seconds": 0.1 * step, "tokens_per_second": 640.0, "mfu": None}
        records.append({"kind": "train", **place, **row})
        if step % 5 == 0:
            means = {"loss": 3.1 / step, "news/loss": 3.2 / step, "bits_per_byte": 1.5, "seconds": 0.1 * step}
            spent = {f"{part}_seconds": 0.1 for part in ("compile", "evaluation", "saving", "lost")}
            records.append({"kind": "validation", **place, **means})
            records.append({"kind": "time", **place, "seconds": 0.1 * step, "wall_seconds": 1.0 * step, **spent})
        if step == 10:
            records.append({"kind": "batch_size", **place, "from": 8, "to": 16, "reason": "staged <b>"})
            records.append({"kind": "setting", **place, "name": "adamw.b1", "from": "0.9", "to": "0.8"})
            skipped = {"first_example": 72, "last_example": 79, "message": "loss nan: step 10 was skipped </script>"}
            records.append({"kind": "warning", **place, **skipped})
            records.append({"kind": "rollback", **place, "to": 40, **skipped, "message": "as at 40 examples again"})
            records.append({"kind": "sample", **place, "prompt": "The ", "text": "batch size"})
            records.append({"kind": "probe", **place, "norm": 3.5, "of": "embedding"})
    return records


def _run_samples(folder: Path) -> list[Path]:
    run = folder / "run"
    run.mkdir()
    _written(run / "run.json", INFO)
    (run / "metrics.jsonl").write_bytes(b"".join(map(to_json, _records())))
    (run / "config.gin").write_text("train.seed = 1\nadamw.b1 = 0.9\n")
    return [run]


def _read_report(folder: Path) -> None:
    """All that `crescendo report` and the papers make of a run, but for the pictures."""
    run = read_run(folder)
    assert isinstance(run.name, str)
    assert _is_whole(run.info["total_examples"], 1)
    for kind, columns in {"train": run.train, "validation": run.validation}.items():
        for name in ("step", "examples_seen"):
            assert columns[name].dtype.kind == "i" or not len(columns[name])
            assert kind == "train" or (np.diff(columns["examples_seen"]) >= 0).all()
    assert (run.train["batch_size"] >= 1).all()
    assert not (run.train["seconds"] < 0).any()
    is_complete(folder)
    arms = compare([run])
    console = Console(quiet=True)
    for table in (arms_table(arms), equal_loss_table(arms), held_out_table(arms), seconds.seconds_table(arms)):
        console.print(table)
    headline(arms)
    with mock.patch.object(plots, "render", return_value=b""):
        page = write_arms(arms, folder / "report", "a title").read_text()
    assert page.count("<script") == 3  # the page's own: Plotly's text has none
    figures = page.partition('id="figures">')[2].partition("</script>")[0]
    json.loads(figures, parse_constant=lambda name: 1 / 0)


def _read_norms(folder: Path) -> None:
    norms = recorded_norms(folder)
    with user_values():
        save_refined(folder / "refined.json", norms)
        refined(0.5, 100, path=folder / "refined.json")


def _info_samples(folder: Path) -> list[Path]:
    return [_written(folder / "run.json", INFO)]


def _read_info(path: Path) -> None:
    """As what goes on from the run reads it."""
    info: Mapping[str, Any] = read_info(path)
    fixed = info.get("fixed", {})
    config = trained.decoder(fixed.get("model", {}), str(path))
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
        assert _is_whole(getattr(config, name), 1)
    shape = jax.ShapeDtypeStruct((8, 4), np.float32)
    shapes = stored_shapes(fixed.get("arrays", {}), {"a": shape, "b": shape}, str(path))
    assert all(_is_whole(size) for size in shapes["a"].shape)


# Models of Hugging Face's.


def _hf_content(model: ModelConfig = MODEL) -> dict[str, Any]:
    return hf.hf_config(model, end_of_text=90, max_length=8) | {
        **{"rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention"] * 2, "use_cache": True},
        **{"initializer_range": 0.02, "attention_dropout": 0.0, "sliding_window": 64, "max_window_layers": 2},
    }


def _hf_config_samples(folder: Path) -> list[Path]:
    (folder / "experts").mkdir()
    experts = dataclasses.replace(MODEL, qk_norm=True, experts=4, expert_width=6)
    return [
        _written(folder / "config.json", _hf_content()),
        _written(folder / "experts" / "config.json", _hf_content(experts)),
    ]


def _read_hf_config(path: Path) -> ModelConfig:
    config = hf.read_config(path.parent)
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "head_size"):
        assert _is_whole(getattr(config, name), 1)
        assert getattr(config, name) < 2**31
    assert _is_number(config.rope_theta, 1e-300)
    assert _is_number(config.norm_epsilon, 0)
    assert isinstance(config.tied_head, bool)
    assert isinstance(config.qk_norm, bool)
    return config


def _hf_samples(folder: Path) -> list[Path]:
    shapes = jax.eval_shape(lambda: models.initialize(MODEL.for_platform("cpu"), jax.random.key(0)))
    random = np.random.default_rng(0)
    tensors = hf.hf_tensors(MODEL, jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes))
    names = sorted(tensors)
    whole, parts = folder / "whole", folder / "parts"
    for path in (whole, parts):
        path.mkdir()
        _written(path / "config.json", _hf_content())
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    weight_map = {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, parts / file)
        weight_map |= dict.fromkeys(own, file)
    _written(parts / hf.INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return [whole, parts]


def _read_hf(folder: Path) -> None:
    config = _read_hf_config(folder / "config.json")
    parameters = hf.read_parameters(folder, config)
    for array in jax.tree.leaves(parameters):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


# What a search keeps.


def _study_samples(folder: Path) -> list[Path]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "study.db"
    study, _ = open_study(path)
    for x in (1.5, 1.25):
        study.enqueue_trial({"x": x})
        trial = study.ask(spaces(["x = uniform(1, 2)"]))
        trial.report(x, 8)
        study.tell(trial, x)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE trials SET datetime_start = '2026-01-01', datetime_complete = '2026-01-01'")
        database.commit()
        database.execute("VACUUM")
    return [path]


def _read_study(path: Path) -> None:
    study, drawn = open_study(path)
    for trial in drawn:
        assert trial.state in optuna.trial.TrialState
        assert all(isinstance(value, float | str) for value in trial.params.values())
    study._storage.remove_session()


# Tiles of kernels.


def _tiles_samples(folder: Path) -> list[Path]:
    return [_written(folder / "tiles.json", tiles.table("attention"))]


def _read_tiles(path: Path) -> None:
    with user_values():
        table = tiles.read(path)
    for entry in (entry for entries in table.values() for entry in entries):
        assert _is_whole(entry["length"], 1)
        assert isinstance(entry["kernel"], str)
        assert all(_is_number(entry.get(name, 1.0), 0) for name in ("ms", "default_ms"))


PARSERS = [
    Parser("critical-batch curve", lambda folder: [_written(folder / "curve.json", CURVE)], _read_curve),
    Parser("refined schedule", _refined_samples, _read_refined),
    Parser("branches", _branch_samples, _read_branches),
    Parser("cells", _cell_samples, _read_cells),
    Parser("report of a run", _run_samples, _read_report),
    Parser("norms of a run", _run_samples, _read_norms),
    Parser("run.json of others", _info_samples, _read_info),
    Parser("Hugging Face config", _hf_config_samples, _read_hf_config),
    Parser("Hugging Face model", _hf_samples, _read_hf),
    Parser("study of a search", _study_samples, _read_study),
    Parser("tiles", _tiles_samples, _read_tiles),
]

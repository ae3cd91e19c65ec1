"""The benchmark's command, with small calls on the CPU: it times nothing that a test could hold."""

import itertools
import json

import jax
import numpy as np
import pytest

from crescendo.pallas_kernels import bench


def test_it_prints_compares_and_draws(tmp_path, capsys):
    arguments = ["rms_norm", "--tags", "quick", "--only", "xla", "jax", "triton", "--passes", "forward"]
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    bench.main([*arguments, *files])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {r["who"] for r in found if r["seconds"] is not None} == {"xla", "jax"}
    assert all(r["error"] for r in found if r["who"] == "triton")
    assert "whole lines  forward  xla" in printed
    # No terminal: the table is as wide as its cells, and a measurement is one line of it.
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert sorted({cell.strip() for cell in (row[2] for row in rows)}) == ["jax", "triton", "xla"]
    assert not [r["error"] for r in found if r["who"] == "jax" and r["error"]]
    specs = bench.specs("rms_norm", ["quick"])
    probed = {spec.name for spec in specs if "probe" in spec.inputs()[1]}  # which JAX's own functions don't have
    assert {r["spec"] for r in found if r["who"] == "jax"} == {spec.name for spec in specs} - probed
    assert len(rows) == 3 * len(specs) - len(probed)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_several_calls_in_a_program_count_one_by_one(passes, monkeypatch):
    timed: list[bench.Prepared] = []
    monkeypatch.setattr(bench, "seconds_in_turns", lambda prepared: timed.extend(prepared) or [6.0] * len(prepared))
    spec = bench.specs("softmax", ["small"])[0]
    (result,) = bench.measure("softmax", spec, passes, bench.candidates("softmax", ["xla"]), calls=3)
    assert result.seconds == 2.0
    results = [jax.tree.leaves(of_call) for of_call in timed[0].call()]
    assert len(results) == 3
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([leaves[0] for leaves in results], 2))


@pytest.mark.parametrize(("passes", "matmuls"), [("forward", 1.0), ("backward", 3.5)])
def test_attention_counts_the_scores_that_the_backward_computes_anew(passes, matmuls):
    (spec,) = (spec for spec in bench.specs("attention", ["speed"]) if spec.name == "full")
    speed, unit = bench.rate(bench.Result("attention", spec.name, "cudnn", passes, 1e-3), spec)
    assert (speed, unit) == (pytest.approx(matmuls * 4 * 4 * 16 * 4096**2 * 128 / 1e9), "TFLOP/s")


def test_who_or_what_is_not_there_is_said(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["rms_norm", "--only", "nobody"])
    assert stopped.value.code == 2
    assert "nobody named ['nobody']" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        bench.main(["rms_norm", "--calls", "0"])
    assert stopped.value.code == 2
    assert "--calls must be at least 1, not 0" in capsys.readouterr().err

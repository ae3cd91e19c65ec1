"""The command `benchmark`: its scaling on simulated devices, and the profile of a step."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.experiments.__main__ import main
from crescendo.experiments.benchmarks import profile
from crescendo.experiments.benchmarks.profile import overlap
from crescendo.experiments.runtime.errors import UserError

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda x: (x[0], x[0] + x[1])), max_size=6)


@given(spans, spans)
def test_overlap_counts_every_unit_of_time_once(collectives, others):
    covered = {t for begin, end in collectives for t in range(begin, end)}
    hidden = {t for begin, end in others for t in range(begin, end)}
    assert overlap(collectives, others) == (len(covered), len(covered - hidden))


@pytest.mark.slow
def test_scaling_compares_with_one_device(capsys):
    options = ["--sequence-length", "32", "--batch-size", "2", "--steps", "1"]
    main(["benchmark", "scaling", "debug", "data", *options])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in rows}
    assert [cells[kind][0] for kind in ("one device", "data")] == ["2", "16"]
    megabytes = [float(cells[kind][4].replace(",", "")) for kind in ("one device", "data")]
    assert megabytes[0] == 0 < megabytes[1]


@pytest.mark.slow
def test_every_way_to_split_experts_is_measured_and_kept(tmp_path, capsys):
    options = ["--sequence-length", "32", "--batch-size", "1", "--steps", "1", "--chunks", "1", "2"]
    main(["benchmark", "experts", "moe-debug", "--fsdp", "8", *options, "--json", str(tmp_path / "ways.json")])
    kept = json.loads((tmp_path / "ways.json").read_text())
    assert (kept["devices"], kept["mesh"], kept["strategy"]) == (8, "data = 1, fsdp = 8", "fsdp")
    ways = {(*way["experts"], way["chunks"]) for way in kept["ways"]}
    assert ways == {("expert", 1), ("fsdp", 1), ("fsdp", 2)}  # the first sends no tokens: one chunk
    seconds = [way["step_seconds"] for way in kept["ways"]]
    assert seconds == sorted(seconds)
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert shown == [", ".join(way["experts"]) for way in kept["ways"]]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [(0, "expert_chunks"), (3, r"^sequence_length = 64 .* and strategy.expert_chunks = 3: use a")],
)
def test_chunks_that_cannot_be_are_refused_before_anything_is_timed(chunks, message, capsys):
    with pytest.raises(UserError, match=message):
        main(
            [
                "benchmark",
                "experts",
                "moe-debug",
                "--fsdp",
                "8",
                "--sequence-length",
                "64",
                "--chunks",
                "1",
                str(chunks),
            ]
        )
    assert not capsys.readouterr().out


def test_ways_to_split_experts_are_of_a_model_that_has_some():
    with pytest.raises(UserError, match="this preset has no experts: name one that has, such as moe-300m"):
        main(["benchmark", "experts", "debug"])


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match=r"'dta'.* data, zero1"):
        main(["benchmark", "scaling", "debug", "dta"])


# As a GPU's compiler writes them: a library's product, a kernel of this project, an elementwise fusion.
PROGRAM = """
%fused (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  ROOT %m = bf16[64,32]{1,0} multiply(%p, %p)
}
ENTRY %main (a: bf16[64,16], b: bf16[16,32]) -> bf16[64,32] {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %cublas.1 = (bf16[64,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/jvp()/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %out = bf16[64,32]{1,0} get-tuple-element(%cublas.1), index=0
  %kernel.2 = bf16[64,32]{1,0} custom-call(%out), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(step)/jvp(attention)/pallas_call"}
  ROOT %fusion.3 = bf16[64,32]{1,0} fusion(%kernel.2), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/optimizer/mul"}
}
"""


def test_a_profile_sums_up_kernels_by_whose_they_are():
    program = profile.instructions(PROGRAM)
    spans = [
        profile.Span("memset", "cublas.1", 0, 2),
        profile.Span("nvjet", "cublas.1", 2, 100),
        profile.Span("attend", "kernel.2", 100, 300),
        profile.Span("fusion_3", "fusion.3", 350, 400),
        profile.Span("ncclDevKernel_AllReduce", "", 380, 500),
    ]
    again = [span._replace(begin=span.begin + 600, end=span.end + 600) for span in spans]
    product, moved = 2 * 64 * 16 * 32, 2 * (64 * 16 + 16 * 32 + 64 * 32) + 4096
    seen = profile.profile(
        spans + again, program, 2, peak_flops_per_second=1e12, bytes_per_second=1e12, flops={"attention": 5e5}
    )
    assert seen.step_seconds == pytest.approx(1100e-9 / 2)
    assert seen.busy_seconds == pytest.approx(450e-9)
    kernels = {kernel.group: kernel for kernel in seen.kernels}
    assert set(kernels) == {"matmul 64x16 . 16x32", "attention", "optimizer", "communication"}
    assert kernels["matmul 64x16 . 16x32"][2:] == pytest.approx((1, 100e-9, product, max(product, moved) / 1e12))
    assert kernels["attention"][2:] == pytest.approx((1, 200e-9, 5e5, 5e5 / 1e12))
    assert kernels["optimizer"][2:] == pytest.approx((1, 50e-9, 0, 2 * 2 * 64 * 32 / 1e12))


def test_a_profile_that_has_no_place_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write .*/file: File exists"):
        main(["benchmark", "train", "debug", "--profile", str(tmp_path / "file")])


@pytest.mark.slow
def test_a_step_is_profiled(tmp_path, capsys):
    options = ["--sequence-length", "16", "--batch-size", "8", "--steps", "1", "--profile", str(tmp_path)]
    main(["benchmark", "train", "debug", *options])
    groups = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert {"attention", "loss", "norm", "optimizer", "idle", "step"} <= set(groups)
    assert any(group.startswith("matmul") for group in groups)
    read = json.loads((tmp_path / "debug.json").read_text())
    busy, kernels = read["busy_seconds"], sum(kernel["seconds"] for kernel in read["kernels"])
    assert 0 < busy <= min(kernels, read["step_seconds"])
    assert (tmp_path / "debug.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "debug").rglob("*.xplane.pb"))

"""The command `benchmark scaling`, on simulated devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crescendo.experiments.__main__ import main
from crescendo.experiments.benchmarks.scaling import overlap
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


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match=r"'dta'.* data, zero1"):
        main(["benchmark", "scaling", "debug", "dta"])

"""What reports say of experts, from the means that evaluations record."""

from types import SimpleNamespace

import numpy as np

from crescendo.experiments.reports.charts import CHARTS, charts_of
from crescendo.experiments.reports.held_out import last_means
from crescendo.experiments.reports.loads import loads
from crescendo.models.moe import load_name

SHARES = np.array(
    [[[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], [[0.2, 0.2, 0.6], [0.5, 0.25, 0.25]]]
)  # evaluation, layer, expert


def run(train=("router_entropy", "dropped_share")):
    columns = {load_name(i, e): SHARES[:, i, e] for i in range(2) for e in range(3)}
    place = dict.fromkeys(("step", "examples_seen", "units_seen", "seconds"), np.array([10, 20]))
    return SimpleNamespace(
        unit="token",
        validation={**place, **columns, "loss": np.array([3.0, 2.0])},
        train={name: np.array([1.0, 0.9]) for name in train},
    )


def test_loads_are_in_even_shares_by_layer_and_expert():
    means = {name: values[-1] for name, values in run().validation.items()}
    np.testing.assert_allclose(loads(means), 3 * SHARES[-1])
    assert loads({name: value for name, value in means.items() if name != load_name(1, 1)}) is None
    assert loads({"loss": 2.0}) is None


def test_tables_have_the_extremes_in_place_of_all():
    means = last_means(run())
    assert means.keys() == {"loss", "least_load", "largest_load"}
    np.testing.assert_allclose([means["least_load"], means["largest_load"]], [0.6, 1.8])


def test_charts_draw_every_load_of_the_last_evaluation_and_the_extremes_of_all():
    charts = {chart.name: chart for chart in CHARTS}
    (every,) = charts["expert_load"].curves(run())
    np.testing.assert_allclose(every.y, 3 * np.append(SHARES[-1], SHARES[-1, -1, -1]))
    largest, least = charts["expert_extremes"].curves(run())
    np.testing.assert_allclose(largest.y, [2.1, 1.8])
    np.testing.assert_allclose(least.y, [0.3, 0.6])


def test_runs_without_experts_have_no_charts_of_them():
    of_experts = {"expert_load", "expert_extremes", "router_entropy", "dropped_share"}
    assert of_experts <= {chart.name for chart in charts_of([("experts", [run()])])}
    assert not of_experts & {chart.name for chart in charts_of([("dense", [run(train=("loss",))])])}

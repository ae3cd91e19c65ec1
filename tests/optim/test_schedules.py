"""Every schedule against its maths in float64, and what all of them have in common."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crescendo import optim
from crescendo.optim import plot, schedules

PEAK, TOTAL, WARMUP = 0.3, 1000, 100
COUNTS = [*range(0, 1000, 7), 999, 1000, 1001, 5000]


def after_warmup(t):
    """From 0 at the end of the warmup to 1 at the end."""
    return min((t - WARMUP) / (TOTAL - WARMUP), 1.0)


def last(t, decay):
    """From 0 to 1 over the last `decay` counts."""
    return min(max((t - (TOTAL - decay)) / decay, 0.0), 1.0)


def half_cosine(start, end, u):
    return end + (start - end) * (1 + math.cos(math.pi * u)) / 2


# schedule -> (options, the maths at t >= WARMUP, as a multiple of PEAK)
MATHS = {
    "constant": ({}, lambda t: 1.0),
    "linear": ({"end_fraction": 0.2}, lambda t: 1 - 0.8 * after_warmup(t)),
    "cosine": ({"end_fraction": 0.1}, lambda t: half_cosine(1.0, 0.1, after_warmup(t))),
    "wsd": ({"decay": 200}, lambda t: 1 - last(t, 200)),
    "wsd sqrt": ({"shape": "sqrt"}, lambda t: 1 - math.sqrt(last(t, 100))),
    "wsd exponential": ({"shape": "exponential", "half_lives": 3}, lambda t: 0.5 ** (3 * last(t, 100))),
    "rex": ({}, lambda t: (1 - after_warmup(t)) / (0.5 + 0.5 * (1 - after_warmup(t)))),
    "power": (
        {"batch_size": 16, "tokens_per_count": 1000, "decay": 200, "amplitude": 4.0},
        lambda t: min(1.0, 16 * 4.0 * (1000 * min(t, 800)) ** -0.51 / PEAK) * (1 - last(t, 200)),
    ),
    "infinite": (
        {"cooldown": 300, "decay": 100, "constant_fraction": 0.5, "end_fraction": 0.05},
        lambda t: half_cosine(1.0, 0.5, min((t - 100) / 300, 1.0)) * 0.1 ** last(t, 100),
    ),
    "rewarm": ({}, lambda t: half_cosine(1.0, 0.1, after_warmup(t))),
    "step": ({"boundaries": (300, 600), "factor": 0.5}, lambda t: 0.5 ** ((t >= 300) + (t >= 600))),
}


@pytest.fixture(scope="module")
def refined_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("refined") / "norms.json"
    optim.save_refined(path, np.linspace(1, 2, 50))
    return path


def make(name, refined_file, *, peak=PEAK, total=TOTAL, **options):
    """Any exported schedule, given what it can't do without."""
    required = {"power": {"batch_size": 16}, "infinite": {"cooldown": 300}, "refined": {"path": refined_file}}
    return optim.SCHEDULES[name](peak, total, **required.get(name, {}) | options)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_no_step_of_a_schedule_is_nan(name, warmup, refined_file):
    """`JAX_DEBUG_NANS` looks at every operation, also at those whose result isn't taken."""
    with jax.debug_nans(True):
        schedule = make(name, refined_file, warmup=warmup)
        rates = [schedule(count) for count in (0, 5, TOTAL // 2, TOTAL, 2 * TOTAL)]
    assert np.isfinite(rates).all()


@pytest.mark.parametrize("name", MATHS)
def test_maths(name):
    options, multiple = MATHS[name]
    expected = [PEAK * (t / WARMUP * multiple(WARMUP) if t < WARMUP else multiple(t)) for t in COUNTS]
    schedule = optim.SCHEDULES[name.split()[0]](PEAK, TOTAL, warmup=WARMUP, **options)
    np.testing.assert_allclose(schedule(jnp.array(COUNTS)), expected, rtol=1e-5, atol=1e-6 * PEAK)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule(jnp.array(COUNTS)), expected, rtol=1e-12, atol=1e-13 * PEAK)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_contract(name, refined_file):
    """float32 scalars, finite and never negative, jittable, the same for every kind of count; still after the end."""
    schedule = make(name, refined_file, warmup=WARMUP)
    jitted = jax.jit(schedule)
    for count in (0, 3, WARMUP, 700, TOTAL):
        rate = jitted(jnp.int32(count))
        assert rate.shape == ()
        assert rate.dtype == jnp.float32
        assert 0 <= rate <= np.float32(PEAK)
        for same in (schedule(count), schedule(np.int64(count)), schedule(jnp.float32(count))):
            assert np.abs(same - rate) <= 1e-6 * PEAK
    assert schedule(TOTAL) == schedule(TOTAL + 1) == schedule(1e9)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(WARMUP / 2), schedule(WARMUP) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "rex", "rewarm"])
@pytest.mark.parametrize("total", [1000, 600_000, 999_999_999_937])
def test_end_points_are_exact(name, total):
    warmup = total // 7
    schedule = optim.SCHEDULES[name](PEAK, total, warmup=warmup, end_fraction=0.25)
    assert schedule(warmup) == np.float32(PEAK)
    assert schedule(total) == np.float32(PEAK) * np.float32(0.25)
    assert optim.SCHEDULES[name](PEAK, total, warmup=warmup, end_fraction=0)(total) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "wsd", "rex", "step", "rewarm", "infinite"]),
    st.floats(10, 1e12),
    st.floats(0, 0.45),
    st.floats(0, 1),
)
def test_falls_after_the_warmup(name, total, warmup_fraction, end_fraction):
    """Within [0, peak] for any length, and it never rises again but by rounding."""
    options = {"factor": end_fraction} if name == "step" else {"end_fraction": end_fraction}
    if name == "infinite":
        options = {"end_fraction": max(end_fraction, 1e-3), "constant_fraction": 1.0, "cooldown": total / 4}
    schedule = optim.SCHEDULES[name](PEAK, total, warmup=warmup_fraction * total, **options)
    rates = np.asarray(schedule(np.linspace(warmup_fraction, 1, 64) * total))
    assert (rates >= 0).all()
    assert (rates <= PEAK * (1 + 1e-6)).all()
    assert (np.diff(rates[1:]) <= 1e-6 * PEAK).all()


def test_infinite_goes_on_and_anneals_on_demand():
    """Without a total the rate stays; with one, the part before the anneal is the same."""
    options = {"warmup": 10, "cooldown": 20, "constant_fraction": 0.5, "end_fraction": 0.1}
    forever = schedules.infinite(1.0, **options)
    annealed = schedules.infinite(1.0, 1000, decay=100, **options)
    assert forever(10**12) == 0.5
    np.testing.assert_array_equal(forever(np.arange(901)), annealed(np.arange(901)))
    np.testing.assert_allclose([annealed(950), annealed(1000)], [math.sqrt(0.05), 0.1], rtol=1e-6)


def test_rewarm_starts_where_the_earlier_run_ended():
    schedule = schedules.rewarm(1.0, 3000, start=1000, warmup=100, start_fraction=0.1)
    np.testing.assert_allclose([schedule(t) for t in (0, 1000, 1050, 1100, 2050, 3000)], [0.1, 0.1, 0.55, 1, 0.55, 0.1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"peak": -0.1}, r"peak = -0.1 must be at least 0 and finite"),
        ("linear", {"peak": math.nan}, r"peak = nan must be at least 0 and finite"),
        ("cosine", {"total": 0}, r"total = 0 must be above 0"),
        ("cosine", {"warmup": -1}, r"warmup = -1 must be at least 0 and finite"),
        ("constant", {"warmup": math.inf}, r"warmup = inf must be at least 0 and finite"),
        ("linear", {"warmup": 1000}, "warmup 1000 don't fit total 1000"),
        ("wsd", {"warmup": 600, "decay": 500}, "warmup 600 [+] decay 500 don't fit total 1000"),
        ("wsd", {"shape": "square"}, "shape = 'square' must be 'linear', 'sqrt' or 'exponential'"),
        ("wsd", {"half_lives": -1, "shape": "exponential"}, r"half_lives = -1 must be at least 0 and finite"),
        ("linear", {"end_fraction": 1.5}, r"end_fraction = 1.5 must be at least 0 and at most 1"),
        ("rex", {"curvature": 1.0}, r"curvature = 1.0 must be at least 0 and below 1"),
        ("power", {"batch_size": 0}, r"batch_size = 0 must be above 0"),
        ("power", {"exponent": 0.5}, r"exponent = 0.5 must be at most 0"),
        ("infinite", {"end_fraction": 0.0}, "end_fraction = 0.0 must be above 0"),
        ("infinite", {"cooldown": 0}, r"cooldown = 0 must be above 0"),
        ("infinite", {"cooldown": 950}, "cooldown 950 [+] decay 100.0 don't fit total 1000"),
        ("rewarm", {"start": 1000}, "start 1000 don't fit total 1000"),
        ("step", {"boundaries": (600, 300)}, r"boundaries must rise strictly .* got \[600, 300\]"),
        ("step", {"boundaries": (500, 1000)}, "boundaries must rise strictly from warmup 0 to below total 1000"),
        ("step", {"factor": -0.5}, r"factor = -0.5 must be at least 0 and at most 1"),
    ],
)
def test_bad_input(name, options, message, refined_file):
    with pytest.raises(ValueError, match=message):
        make(name, refined_file, **options)


OF_RUN = [name for name in optim.SCHEDULES if name not in ("constant", "infinite")]


@pytest.mark.parametrize("name", OF_RUN)
def test_without_a_total_the_run_says_its_length(name, refined_file):
    """The same rates as with a total; until the length is known there is none, but mistakes are found at once."""
    ours, given = make(name, refined_file, total=None, warmup=100), make(name, refined_file, warmup=100)
    np.testing.assert_array_equal(ours.of(TOTAL)(np.array(COUNTS)), given(np.array(COUNTS)))
    assert given.total == ours.of(TOTAL).total == TOTAL
    with pytest.raises(
        ValueError, match="length isn't known: give it a total, or pass the extra argument total_exampl"
    ):
        ours(3)
    with pytest.raises(optim.LengthError, match=r"(warmup|start|boundaries).* 100.*total 50"):
        ours.of(50)
    for bad in ({"peak": math.nan}, {"warmup": -1}):
        with pytest.raises(ValueError, match="must be at least 0 and finite"):
            make(name, refined_file, **{"total": None, "warmup": 100} | bad)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wsd", {"shape": "square"}, "shape = 'square' must be"),
        ("linear", {"end_fraction": 1.5}, "end_fraction = 1.5 must be at least 0 and at most 1"),
        ("step", {"boundaries": (600, 300)}, r"to below total \(the run's length\), got \[600, 300\]"),
        ("power", {"exponent": 0.5}, "exponent = 0.5 must be at most 0"),
    ],
)
def test_what_does_not_depend_on_the_total_is_checked_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        optim.SCHEDULES[name](PEAK, **options)


def test_constant_and_infinite_need_no_length():
    assert schedules.constant(PEAK)(10**9) == np.float32(PEAK)
    assert not hasattr(schedules.constant(PEAK, TOTAL), "total")
    assert not hasattr(schedules.infinite(PEAK, cooldown=5), "total")
    assert schedules.infinite(PEAK, TOTAL, cooldown=5).total == TOTAL


def test_power_at_the_present_batch():
    """The cap holds at every batch: at 256 the rate is min(peak, 256 a n^b), and not a multiple of the cap."""
    schedule = schedules.power(0.02, tokens_per_count=1e6).of(TOTAL)
    at = jax.jit(lambda size, count: schedule.at_batch_size(size)(count))
    for size in (16, 256):
        expected = min(0.02, size * 4.6 * 5e8**-0.51)
        np.testing.assert_allclose(at(size, 500), expected, rtol=1e-5)
        given = schedules.power(0.02, TOTAL, batch_size=size, tokens_per_count=1e6)
        np.testing.assert_allclose(given(500), at(size, 500), rtol=1e-6)
    with pytest.raises(ValueError, match="power schedule needs the batch: give it batch_size, or pass the extra arg"):
        schedule(500)


def test_plot_draws_every_schedule(tmp_path, capsys):
    """All of them in one PNG, and chosen ones with arguments."""
    plot.main(["--output", str(tmp_path / "all.png")])
    plot.main(["linear", "wsd:shape=sqrt,decay=300", "--output", str(tmp_path / "two.png")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "all.png"), str(tmp_path / "two.png")]
    for name in ("all", "two"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("line", "unknown schedule 'line': use one of constant, linear"),
        ("wsd:decay", "'decay' in 'wsd:decay' is not KEY=VALUE"),
        ("wsd:decays=3", "decays"),
        ("wsd:decay=5000", "don't fit total"),
        ("refined:path=nowhere.json", "nowhere.json"),
    ],
)
def test_plot_bad_input(name, message, capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main([name])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

"""A rate shows its Wilson interval; what is no rate raises."""

import math

import pytest

import gradroute as gr
from gradroute.evaluation import Rate

REFUSED = (gr.GradRouteError, TypeError)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # (2k + z^2 -+ z sqrt(z^2 + 4k (1 - k/n))) / (2 (n + z^2)), z = 1.959964, worked out by hand
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 100, 0.00177, 0.05449),
        (64, 64, 0.94338, 1.0),
    ],
)
def test_intervals_are_wilsons(k: int, n: int, low: float, high: float) -> None:
    rate = Rate(k, n)
    assert rate.value == k / n
    assert rate.interval == pytest.approx((low, high), abs=1e-5)
    z = 1.959963984540054
    half = z * math.sqrt(z * z + 4 * k * (1 - k / n))
    formula = [(2 * k + z * z + sign * half) / (2 * (n + z * z)) for sign in (-1, 1)]
    assert rate.interval == pytest.approx(formula, abs=1e-9)


def test_a_rate_shows_its_interval_and_n() -> None:
    assert repr(Rate(5, 10)) == "0.50 [0.24, 0.76] (n=10)"


def test_nothing_counted_has_no_rate() -> None:
    rate = Rate(0, 0)
    assert math.isnan(rate.value)
    assert all(map(math.isnan, rate.interval))
    assert repr(rate) == "- (n=0)"


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (0, -1)])
def test_counts_that_are_none_raise(k: int, n: int) -> None:
    with pytest.raises(gr.GradRouteError, match="`k`"):
        Rate(k, n)


@pytest.mark.parametrize("k", [2.0, True, math.nan, "2"])
def test_counts_are_integers(k: object) -> None:
    with pytest.raises(REFUSED, match="integer|class 'int'"):
        Rate(k, 4)

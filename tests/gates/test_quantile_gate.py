"""`QuantileGate` against its formula, rollout by rollout."""

import warnings

import pytest
import torch
from support.language_models import PAIRS, ids_only, random_directions, routed_mixer, scoring_directions
from torch import Tensor

import gradroute as gr
from gradroute.gates.quantile import QuantileGate, weighted_tails

REFUSED = (gr.GradRouteError, TypeError)
KEEP, ABSORB, ROUTE = 0, 1, 2


def directions_of_one() -> gr.Directions:
    """Scores are the features themselves."""
    return scoring_directions(hack=[1.0], clean=[0.0])


def scored(values: list[float]) -> dict[str, Tensor]:
    return {"m": torch.tensor(values, dtype=torch.float32)[:, None]}


def zones(mask: gr.RouteMask) -> list[int]:
    """keep (0, 1, 0), absorb (1, 1, 1), route (1, 0, 1)."""
    named = {(0.0, 1.0, 0.0): KEEP, (1.0, 1.0, 1.0): ABSORB, (1.0, 0.0, 1.0): ROUTE}
    return [named[row] for row in zip(mask.m.tolist(), mask.g_d.tolist(), mask.g_q.tolist(), strict=True)]


class Slow:
    """The gate of the formula: all features ever seen, everything scored anew at each call, in Python floats."""

    def __init__(self, directions: gr.Directions, tails=(0.1, 0.9), half_life=96.0, capacity=8192, warm_up=32) -> None:
        self.directions, self.tails, self.half_life = directions, tails, half_life
        self.capacity, self.warm_up, self.calls = capacity, warm_up, []

    def __call__(self, features: dict[str, Tensor]) -> list[int]:
        self.calls.append(features)
        rows = [
            (sum(float(self.directions.rows[n].sum(0) @ call[n][i]) for n in self.directions.rows), c)
            for c, call in enumerate(self.calls)
            for i in range(len(next(iter(call.values()))))
        ]
        later = [sum(len(next(iter(call.values()))) for call in self.calls[c + 1 :]) for c in range(len(self.calls))]
        buffer = [(s, 0.5 ** (later[c] / self.half_life)) for s, c in rows][-self.capacity :]
        present = rows[-len(next(iter(features.values()))) :]
        if len(buffer) < self.warm_up:
            return [ABSORB] * len(present)
        total = sum(w for _, w in buffer)
        low, high = self.tails
        t_lo = min(t for t, _ in buffer if sum(w for s, w in buffer if s <= t) >= low * total * (1 - 1e-9))
        t_hi = max(t for t, _ in buffer if sum(w for s, w in buffer if s >= t) >= (1 - high) * total * (1 - 1e-9))
        return [
            ABSORB if s <= t_lo and s >= t_hi else KEEP if s <= t_lo else ROUTE if s >= t_hi else ABSORB
            for s, _ in present
        ]


@pytest.mark.parametrize(
    "settings",
    [
        {"warm_up": 5},
        {"warm_up": 12, "tails": (0.3, 0.6), "half_life": 7.0},
        {"warm_up": 1, "half_life": 3.0, "capacity": 20},
        {"warm_up": 20, "capacity": 20, "tails": (0.5, 0.75)},
    ],
)
def test_it_equals_the_formula_over_a_run_with_refreshes(settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = random_directions(k=2, pairs=4)
    made, slow = QuantileGate(directions, window=1000, **settings), Slow(directions, **settings)
    found: list[int] = []
    for call in range(16):
        n = int(torch.randint(1, 8, (), generator=generator))
        features = {
            name: torch.randn(n, rows.shape[1], generator=generator, dtype=torch.float64) + 0.1 * call
            for name, rows in directions.rows.items()
        }
        if call in (6, 7, 12):
            directions.update_(random_directions(k=2, pairs=4, seed=call), step=call)
        mask = made(features)
        assert zones(mask) == slow(features)
        found += zones(mask)
    assert {KEEP, ABSORB, ROUTE} == set(found)


def test_the_tails_of_ten_equal_weights_are_one_rollout_each() -> None:
    assert zones(QuantileGate(directions_of_one(), warm_up=10)(scored([3, 1, 4, 10, 5, 9, 2, 6, 8, 7]))) == [
        ABSORB, KEEP, ABSORB, ROUTE, ABSORB, ABSORB, ABSORB, ABSORB, ABSORB, ABSORB
    ]  # fmt: skip


def test_reversed_scores_exchange_keep_and_route() -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (2, 3, 10, 37):
        scores, weights = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(2))
        low, high = weighted_tails(scores, weights, 0.2, 0.7)
        assert weighted_tails(-scores, weights, 0.3, 0.8) == (-high, -low)
        assert low <= high


@pytest.mark.parametrize("n", [10, 20, 30, 70])
def test_shares_that_are_met_exactly_are_not_missed_by_rounding(n: int) -> None:
    scores = torch.arange(1.0, n + 1.0, dtype=torch.float64)
    for weight in (1.0, 0.1, 1 / 3):
        weights = torch.full((n,), weight, dtype=torch.float64)
        for tenths in range(1, 9):
            low, high = weighted_tails(scores, weights, tenths / 10, 0.9)
            assert (low, high) == (n * tenths // 10, n - n // 10 + 1)


def test_the_order_within_a_batch_means_nothing() -> None:
    first, second = QuantileGate(directions_of_one(), warm_up=4), QuantileGate(directions_of_one(), warm_up=4)
    values = [[3.0, 9.0, 1.0, 7.0], [2.0, 10.0, 0.0, 6.0]]
    for batch in values:
        a, b = zones(first(scored(batch))), zones(second(scored(batch[::-1])))
        assert a == b[::-1]
        assert len(set(a)) > 1
    assert first.thresholds == second.thresholds


def test_recent_rollouts_weigh_more() -> None:
    """One half-life after twenty rollouts around 0, ten around 100 are half of the weight."""
    made = QuantileGate(directions_of_one(), half_life=10.0, warm_up=20, tails=(0.25, 0.75))
    made(scored([float(i % 10) for i in range(20)]))
    assert made.thresholds == (2.0, 7.0)
    made(scored([100.0 + i for i in range(10)]))
    low, high = made.thresholds
    assert low == 4.0
    assert high == 105.0


@pytest.mark.corner("the weight of an old rollout underflows", "it fades to zero and is never NaN")
def test_an_old_rollout_fades_but_is_never_a_nan() -> None:
    made = QuantileGate(directions_of_one(), half_life=0.01, warm_up=1, tails=(0.1, 0.9))
    made(scored([1000.0, -1000.0]))
    made(scored([1.0, 2.0, 3.0]))
    assert made.thresholds == (1.0, 3.0)


# Ties


@pytest.mark.parametrize("values", [[5.0] * 8, [5.0] * 40])
def test_equal_scores_absorb(values: list[float]) -> None:
    made = QuantileGate(directions_of_one(), warm_up=8)
    assert zones(made(scored(values))) == [ABSORB] * len(values)
    assert made.thresholds == (5.0, 5.0)


def test_what_lies_outside_of_a_tie_is_still_a_tail() -> None:
    made = QuantileGate(directions_of_one(), warm_up=8)
    assert zones(made(scored([*[5.0] * 20, 4.0, 6.0]))) == [*[ABSORB] * 20, KEEP, ROUTE]


# Warm-up, capacity


def test_it_absorbs_while_it_warms_up_and_does_not_count_those_calls() -> None:
    made = QuantileGate(directions_of_one(), warm_up=5, window=1, strict=True)
    assert made.thresholds is None
    assert zones(made(scored([1.0, 2.0]))) == [ABSORB, ABSORB]
    assert zones(made(scored([1.0, 9.0]))) == [ABSORB, ABSORB]
    assert "4 of 5 rollouts to warm up" in repr(made)
    assert zones(made(scored([0.0, 10.0]))) == [KEEP, ROUTE]
    assert "keep up to 0, route from 10, 6 rollouts" in repr(made)
    with pytest.raises(gr.GradRouteError, match="routed nothing in 1 calls"):
        made(scored([5.0, 5.0]))


def test_the_buffer_keeps_the_newest_rollouts_and_its_size() -> None:
    made = QuantileGate(directions_of_one(), capacity=6, warm_up=6, half_life=1e9)
    sizes = []
    for first in range(0, 40, 4):
        made(scored([float(first + i) for i in range(4)]))
        sizes.append(sum(t.numel() for t in made._buffer.values()))
    assert len(made) == 6
    assert len(set(sizes)) == 1
    assert sorted(made.state_dict()["buffer"]["scores"].tolist()) == [34.0, 35.0, 36.0, 37.0, 38.0, 39.0]
    assert made.thresholds == (34.0, 39.0)


def test_a_call_scores_only_its_own_rows_until_a_refresh() -> None:
    directions, counted = directions_of_one(), []

    class Counting(gr.Directions):
        def score(self, features):  # type: ignore[no-untyped-def]
            counted.append(len(features["m"]))
            return super().score(features)

    counting = Counting(directions.rows, directions.hack, directions.clean, directions.provenance)
    made = QuantileGate(counting, warm_up=4, window=1000)
    for _ in range(5):
        made(scored([1.0, 2.0, 3.0]))
    assert counted == [3] * 5
    counting.update_(directions_of_one(), step=1)
    made(scored([1.0, 2.0]))
    made(scored([1.0, 2.0]))
    assert counted[5:] == [2, 15, 2]


def test_after_a_refresh_old_rollouts_have_their_new_scores() -> None:
    directions = directions_of_one()
    made = QuantileGate(directions, warm_up=4)
    made(scored([1.0, 2.0, 3.0, 4.0]))
    assert made.thresholds == (1.0, 4.0)
    turned = directions_of_one()
    turned.rows["m"] = -turned.rows["m"]
    directions.update_(turned, step=1)
    assert made.thresholds == (-4.0, -1.0)
    assert zones(made(scored([0.0, 5.0]))) == [ROUTE, KEEP]


def test_a_module_that_only_a_refresh_gives_rows_scores_old_rollouts_too() -> None:
    directions, full = random_directions(pairs=4), random_directions(pairs=4)
    del directions.rows["m1"]
    made = QuantileGate(directions, warm_up=2)
    features = {name: torch.randn(6, pairs.shape[1], dtype=torch.float64) for name, pairs in full.hack.items()}
    with pytest.raises(gr.GradRouteError, match="should hold the module `m1`, 6 wide"):
        made({"m0": features["m0"]})
    made(features)
    before = made.thresholds
    directions.update_(full, step=1)
    scores = full.score(features)
    assert made.thresholds == (scores.min().item(), scores.max().item()) != before


# With a model


def test_it_gates_captured_rollouts() -> None:
    model = routed_mixer()
    directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    made = QuantileGate(directions, warm_up=8)
    ids = torch.randint(12, (8, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones(8, 6)) as acts:
        model(ids)
    mask = made(acts)
    scores = directions.score(acts)
    assert zones(mask)[int(scores.argmax())] == ROUTE
    assert zones(mask)[int(scores.argmin())] == KEEP
    assert zones(mask).count(ABSORB) == 6
    with gr.route(model, mask):
        model(ids).sum().backward()
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones(8, 6), reduction="sum") as other:
        model(ids)
    with pytest.raises(gr.GradRouteError, match="captured as"):
        made(other)
    assert len(made) == 8


def test_inner_products_are_no_features() -> None:
    model = routed_mixer()
    directions = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, features="parameter")
    ids = torch.randint(12, (8, 6), generator=torch.Generator().manual_seed(0))
    with gr.capture_gradients(model, features="parameter", directions=directions) as products:
        model(ids).square().sum().backward()
    assert directions.score(products).shape == (8,)
    with pytest.raises(gr.GradRouteError, match="Found a capture of inner products.*BandGate"):
        QuantileGate(directions)(products)


# What is refused


def test_features_and_not_scores() -> None:
    with pytest.raises(REFUSED, match="features"):
        QuantileGate(directions_of_one())(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refused_batch_leaves_the_buffer_alone(bad: float) -> None:
    made = QuantileGate(directions_of_one(), warm_up=2, capacity=4)
    made(scored([1.0, 2.0, 3.0]))
    before = made.state_dict()["buffer"]
    for features, message in (
        (scored([1.0, bad]), "`scores` should be finite"),
        (scored([1.0] * 5), r"1 to 4 \(`capacity`\) rows. Found 5"),
        ({"m": torch.empty(0, 1)}, "Found 0"),
        ({"other": torch.ones(1, 1)}, "the module `m`"),
    ):
        with pytest.raises(gr.GradRouteError, match=message):
            made(features)
    after = made.state_dict()["buffer"]
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"tails": (0.9, 0.1)}, "tails"),
        ({"tails": (0.0, 0.9)}, "tails"),
        ({"tails": (0.1, 1.0)}, "tails"),
        ({"tails": (0.5, 0.5)}, "tails"),
        ({"half_life": 0.0}, "half_life"),
        ({"half_life": float("inf")}, "half_life"),
        ({"half_life": float("nan")}, "half_life"),
        ({"capacity": 0}, "capacity"),
        ({"warm_up": 0}, "warm_up"),
        ({"capacity": 8, "warm_up": 9}, "`warm_up` should be at most `capacity`"),
        ({"window": 0}, "window"),
    ],
)
def test_settings_out_of_range_raise(settings: dict, argument: str) -> None:
    with pytest.raises(REFUSED, match=argument):
        QuantileGate(directions_of_one(), **settings)
    with pytest.raises(REFUSED, match="directions"):
        QuantileGate({"m": torch.ones(1, 1)})


# State


def batches(n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"m": torch.randn(4, 1, generator=generator)} for _ in range(n)]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("saved_after", [0, 1, 2, 4, 7])
def test_a_resumed_gate_goes_on_bitwise(saved_after: int, stale: bool, tmp_path) -> None:
    def make(directions: gr.Directions) -> QuantileGate:
        return QuantileGate(directions, capacity=10, warm_up=5, half_life=6.0, window=3)

    def turned() -> gr.Directions:
        fresh = directions_of_one()
        fresh.rows["m"] = -fresh.rows["m"]
        return fresh

    directions = directions_of_one()
    whole = make(directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gr.GradRouteWarning)
        masks = []
        for call, batch in enumerate(batches(10)):
            if call == saved_after:
                if stale:
                    directions.update_(turned(), step=2)
                torch.save(whole.state_dict(), tmp_path / "gate.pt")
            masks.append(whole(batch))
        resumed = make(directions_of_one().update_(turned(), step=2) if stale else directions_of_one())
        resumed.load_state_dict(torch.load(tmp_path / "gate.pt"))
        for batch, expected in zip(batches(10)[saved_after:], masks[saved_after:], strict=True):
            assert zones(resumed(batch)) == zones(expected)
        fresh = make(directions_of_one())
        fresh(batches(10)[-1])
    now, then = resumed.state_dict(), whole.state_dict()
    for name, value in then["buffer"].items():
        assert torch.equal(torch.as_tensor(now["buffer"][name]), torch.as_tensor(value)), name
    assert now["calls"] == then["calls"]
    assert resumed.thresholds == whole.thresholds != fresh.thresholds


def test_the_state_does_not_change_with_the_gate() -> None:
    made = QuantileGate(directions_of_one(), capacity=4, warm_up=2)
    made(scored([1.0, 2.0, 3.0]))
    state = made.state_dict()
    made(scored([7.0, 8.0]))
    assert state["buffer"]["scores"].tolist() == [1.0, 2.0, 3.0]


def test_a_foreign_state_raises() -> None:
    made = QuantileGate(directions_of_one(), warm_up=2)
    made(scored([1.0, 2.0, 3.0]))
    with pytest.raises(gr.errors.FileFormatError, match="half_life=5.0. Found 96.0 here"):
        made.load_state_dict(QuantileGate(directions_of_one(), warm_up=2, half_life=5.0).state_dict())
    with pytest.raises(
        gr.errors.FileFormatError, match="format gradroute-QuantileGate-1. Found 'gradroute-LabelGate-1'"
    ):
        made.load_state_dict(gr.LabelGate().state_dict())
    later = directions_of_one().update_(directions_of_one(), step=3)
    with pytest.raises(gr.errors.FileFormatError, match="saved with version=0. Found 1 here"):
        QuantileGate(later, warm_up=2).load_state_dict(made.state_dict())
    assert len(made) == 3

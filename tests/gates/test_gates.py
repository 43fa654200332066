"""Gates: from labels or scores to zones."""

import warnings

import pytest
import torch
from support.language_models import random_directions, scoring_directions
from torch import Tensor

import gradroute as gr
from gradroute.gates.threshold import ThresholdGate

REFUSED = (gr.GradRouteError, TypeError)
KEEP, ABSORB, ROUTE = (0.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 1.0)
FLAGS = torch.tensor([True, False, True])


def weights(mask: gr.RouteMask) -> list[tuple[float, ...]]:
    """(m, g_d, g_q) of every row."""
    return list(zip(mask.m.tolist(), mask.g_d.tolist(), mask.g_q.tolist(), strict=True))


def gate(**settings: object) -> gr.BandGate:
    """z = 0 at a score of 2, z = 1 at a score of 6."""
    return gr.BandGate(scoring_directions(hack=[5.0, 7.0], clean=[1.0, 3.0]), **settings)


# Labels


@pytest.mark.parametrize(("below", "zone"), [("absorb", ABSORB), ("keep", KEEP)])
def test_a_label_gate_routes_flagged_rows(below: str, zone: tuple[float, ...]) -> None:
    assert weights(gr.LabelGate(below=below)(FLAGS)) == [ROUTE, zone, ROUTE]


def test_a_label_gate_absorbs_by_default() -> None:
    assert weights(gr.LabelGate()(FLAGS)) == [ROUTE, ABSORB, ROUTE]
    assert repr(gr.LabelGate()) == "LabelGate(below='absorb')"


@pytest.mark.parametrize("flags", [torch.tensor([1, 0]), torch.tensor([0.3, 0.9])])
def test_labels_must_be_boolean(flags: Tensor) -> None:
    with pytest.raises(REFUSED, match="flags"):
        gr.LabelGate()(flags)


# Scores


def test_z_is_zero_at_the_clean_mean_and_one_at_the_hack_mean() -> None:
    scores = torch.tensor([2.0, 6.0, 4.0, 0.0, 8.0])
    assert gate().ends == (2.0, 6.0)
    assert gate().z(scores).tolist() == [0.0, 1.0, 0.5, -0.5, 1.5]
    assert not gate().reversed


def test_the_pairs_own_mean_scores_are_the_ends() -> None:
    directions = random_directions()
    hack, clean = directions.pair_scores()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gr.GradRouteWarning)
        made = gr.BandGate(directions)
        assert made.z(hack).mean() == pytest.approx(1.0)
        assert made.z(clean).mean() == pytest.approx(0.0, abs=1e-12)


def test_a_row_is_routed_from_the_threshold_on() -> None:
    scores = torch.tensor([2.0, 3.9, 4.0, 6.0, 9.0])
    assert weights(gate()(scores)) == [ABSORB, ABSORB, ROUTE, ROUTE, ROUTE]
    assert weights(gate(threshold=1.0)(scores)) == [ABSORB, ABSORB, ABSORB, ROUTE, ROUTE]
    assert gate(threshold=1.5).flags(scores).tolist() == [False, False, False, False, True]


def test_rows_below_the_threshold_may_be_kept() -> None:
    assert weights(gate(below="keep")(torch.tensor([2.0, 6.0]))) == [KEEP, ROUTE]


def test_a_soft_gate_is_a_linear_ramp() -> None:
    mask = gate(soft=True)(torch.tensor([-1.0, 2.0, 3.0, 5.0, 6.0, 20.0]))
    shares = [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]
    assert weights(mask) == [(1.0, 1.0 - f, f) for f in shares]


def test_scores_of_tokens_make_a_mask_of_tokens() -> None:
    assert gate()(torch.tensor([[2.0, 6.0], [6.0, 2.0]])).routed.tolist() == [[False, True], [True, False]]


# Directions that change


@pytest.mark.corner("directions are updated after the gate was made", "the gate reads its ends again")
def test_ends_are_read_again_after_an_update() -> None:
    directions = scoring_directions(hack=[6.0], clean=[2.0])
    made = gr.BandGate(directions)
    assert made(torch.tensor([5.0])).routed.tolist() == [True]
    directions.update_(scoring_directions(hack=[10.0], clean=[4.0]), step=1)
    assert made.ends == (4.0, 10.0)
    assert made(torch.tensor([5.0])).routed.tolist() == [False]
    assert "z=0 at 4, z=1 at 10" in repr(made)
    assert "version 1" in repr(made)


def test_an_update_to_equal_ends_raises_at_each_use() -> None:
    directions = scoring_directions(hack=[6.0], clean=[2.0])
    made = gr.BandGate(directions)
    directions.update_(scoring_directions(hack=[4.0], clean=[4.0]), step=1)
    for _ in range(2):
        with pytest.raises(gr.GradRouteError, match="different mean scores. Found 4 and 4"):
            made(torch.tensor([5.0]))


def test_an_update_that_reverses_the_ends_warns_and_turns_the_gate() -> None:
    directions = scoring_directions(hack=[6.0], clean=[2.0])
    made = gr.BandGate(directions)
    directions.update_(scoring_directions(hack=[2.0], clean=[6.0]), step=1)
    with pytest.warns(gr.GradRouteWarning, match=r"hack pairs score below the clean ones \(2 < 6\)"):
        flags = made.flags(torch.tensor([1.0, 7.0]))
    assert flags.tolist() == [True, False]


# Reversed and equal ends


def test_a_reversed_direction_warns_and_routes_low_scores() -> None:
    with pytest.warns(gr.GradRouteWarning, match=r"hack pairs score below the clean ones \(2 < 6\).*routes low scores"):
        made = gr.BandGate(scoring_directions(hack=[2.0], clean=[6.0]))
    assert made.reversed
    assert made.z(torch.tensor([6.0, 2.0])).tolist() == [0.0, 1.0]
    assert weights(made(torch.tensor([1.0, 7.0]))) == [ROUTE, ABSORB]
    assert "reversed" in repr(made)


def test_the_sign_of_a_random_control_is_arbitrary_and_no_reason_to_warn() -> None:
    real = scoring_directions(hack=[6.0], clean=[2.0])
    gates = [gr.BandGate(real.random_like(seed=seed)) for seed in range(8)]
    assert {made.reversed for made in gates} == {True, False}
    for made in gates:
        hack, clean = made.directions.pair_scores()
        assert made.flags(torch.cat([hack, clean])).tolist() == [True, False]


@pytest.mark.corner("the hack and the clean pairs score alike", "`GradRouteError`: there is no scale between them")
@pytest.mark.parametrize(("hack", "clean"), [([4.0], [4.0]), ([0.0], [0.0]), ([1e6, 1e6], [1e6, 1e6 + 0.5])])
def test_equal_ends_raise(hack: list[float], clean: list[float]) -> None:
    with pytest.raises(gr.GradRouteError, match="clean and hack pairs should have different mean scores. Found"):
        gr.BandGate(scoring_directions(hack, clean))


# What is refused


@pytest.mark.corner("a score is NaN or infinite", "`GradRouteError`, and no mask")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("soft", [False, True])
def test_scores_that_are_not_finite_raise(bad: float, soft: bool) -> None:
    with pytest.raises(gr.GradRouteError, match=rf"`scores` should be finite. Found {bad} at index \[1\]"):
        gate(soft=soft)(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"below": "keep"}, {"below": "absorb"}])
def test_a_soft_gate_has_no_threshold_and_no_below(settings: dict[str, object]) -> None:
    with pytest.raises(gr.GradRouteError, match="soft gate has no `threshold` and no `below`"):
        gate(soft=True, **settings)


def test_a_soft_gate_flags_nothing() -> None:
    with pytest.raises(gr.GradRouteError, match=r"soft gate flags nothing.*z\(scores\)"):
        gate(soft=True).flags(torch.tensor([1.0]))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_is_not_finite_raises(threshold: float) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`threshold` should be finite. Found {threshold}"):
        gate(threshold=threshold)


def test_unknown_zones_below_the_threshold_raise() -> None:
    for make in (gate, gr.LabelGate):
        with pytest.raises(REFUSED, match="below"):
            make(below="route")


@pytest.mark.parametrize("directions", [None, {"m": torch.ones(1, 1)}])
def test_a_gate_needs_directions(directions: object) -> None:
    for make in (gr.BandGate, gr.BandGate):
        with pytest.raises(REFUSED, match="directions"):
            make(directions)


# A threshold on scores with a scale of their own


def test_a_threshold_gate_routes_from_the_threshold_on() -> None:
    scores = torch.tensor([0.2, 0.5, 0.9])
    assert weights(ThresholdGate(0.5)(scores)) == [ABSORB, ROUTE, ROUTE]
    assert weights(ThresholdGate(0.5, below="keep")(scores)) == [KEEP, ROUTE, ROUTE]
    assert ThresholdGate(0.5)(torch.tensor([[0.2, 0.9]])).routed.tolist() == [[False, True]]
    assert repr(ThresholdGate(0.5)) == "ThresholdGate(0.5, below='absorb')"


def test_a_threshold_gate_refuses_what_is_not_finite() -> None:
    with pytest.raises(gr.GradRouteError, match=r"`scores` should be finite. Found nan at index \[1\]"):
        ThresholdGate(0.5)(torch.tensor([1.0, float("nan")]))
    for bad in (float("nan"), float("-inf"), True):
        with pytest.raises(gr.GradRouteError, match="`threshold` should be finite"):
            ThresholdGate(bad)


# Gates that do not tell rows apart

NONE, SOME, ALL = [0.0, 0.1], [0.0, 9.0], [9.0, 8.0]


def gates_of_scores(**settings: object) -> list:
    return [gate(**settings), gate(soft=True, **settings), ThresholdGate(5.0, **settings)]


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("scores", "what"), [(NONE, "nothing"), (ALL, "everything")])
def test_a_gate_that_routes_nothing_or_everything_says_so_once_per_window(
    kind: int, scores: list[float], what: str
) -> None:
    made = gates_of_scores(window=3)[kind]
    for _ in range(2):
        made(torch.tensor(scores))
        made(torch.tensor(scores))
        with pytest.warns(gr.GradRouteWarning, match=f"routed {what} in 3 calls") as caught:
            made(torch.tensor(scores))
        assert len(caught) == 1
    for scored in (SOME, scores, scores, scores, scores, SOME):
        made(torch.tensor(scored))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_window_with_some_calls_of_all_and_some_of_none_is_in_order(kind: int) -> None:
    made = gates_of_scores(window=2)[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        routed = [bool(made(torch.tensor(scores)).routed.all()) for scores in (NONE, ALL) * 3]
    assert routed == [False, True] * 3
    assert not caught


def test_a_soft_gate_that_routes_a_little_is_in_order() -> None:
    made = gate(soft=True, window=1, strict=True)
    for little_or_much in ([2.5, 2.0], [5.0, 7.0]):
        assert not made(torch.tensor(little_or_much)).routed.all()


def test_a_strict_gate_raises_instead_and_begins_a_new_window() -> None:
    made = gr.LabelGate(window=2, strict=True)
    none = torch.tensor([False, False])
    for _ in range(2):
        made(none)
        with pytest.raises(gr.GradRouteError, match="LabelGate.* routed nothing in 2 calls"):
            made(none)
    made(none)
    made(FLAGS)


def test_fifty_calls_are_the_window_of_every_gate() -> None:
    directions = scoring_directions(hack=[6.0], clean=[2.0])
    assert {made.window for made in (*gates_of_scores(), gr.LabelGate(), gr.BandGate(directions))} == {50}


@pytest.mark.parametrize("window", [0, -1, 1.5, True])
def test_a_window_is_a_number_of_calls(window: object) -> None:
    with pytest.raises(REFUSED, match="window"):
        gr.LabelGate(window=window)


# State


def label_gate(**changed: object) -> gr.LabelGate:
    return gr.LabelGate(**{"recall": 0.5, "false_positive_rate": 0.05, "window": 4, **changed})


MAKERS = {
    "label": (label_gate, torch.arange(20) % 2 == 0),
    "threshold": (lambda **s: ThresholdGate(5.0, **{"window": 4, **s}), torch.tensor(NONE)),
    "band": (lambda **s: gate(**{"window": 4, **s}), torch.tensor(NONE)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_gate_goes_on_from_its_state(kind: str, tmp_path) -> None:
    make, rows = MAKERS[kind]
    whole, first, resumed = make(), make(), make()
    masks = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            masks.append(whole(rows))
        for_whole = len(said)
        for _ in range(3):
            first(rows)
        torch.save(first.state_dict(), tmp_path / "gate.pt")
        resumed.load_state_dict(torch.load(tmp_path / "gate.pt"))
        again = [resumed(rows) for _ in range(3)]
    assert len(said) == 2 * for_whole
    assert for_whole == (0 if kind == "label" else 1)
    for mask, expected in zip(again, masks[3:], strict=True):
        assert torch.equal(mask.g_d, expected.g_d)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert resumed.state_dict()["calls"] == whole.state_dict()["calls"] != make().state_dict()["calls"]
    if kind == "label":
        unlike = make()(rows)
        assert not torch.equal(unlike.g_d, again[0].g_d)
        assert resumed.state_dict()["simulation"]["hits"] == whole.state_dict()["simulation"]["hits"] > 0
        assert resumed._false_alarms == whole._false_alarms


@pytest.mark.parametrize("kind", MAKERS)
def test_a_foreign_state_raises_and_changes_nothing(kind: str) -> None:
    make, rows = MAKERS[kind]
    made = make()
    made(rows)
    before = made.state_dict()
    own = {**before}
    other = {"label": "threshold", "threshold": "band", "band": "label"}[kind]
    wrong = [
        ({}, "format"),
        (MAKERS[other][0]().state_dict(), "format gradroute-"),
        ({**own, "format": own["format"][:-1] + "0"}, "should be a state_dict of the format"),
        ({name: value for name, value in own.items() if name != "calls"}, r"Different: \['calls'\]"),
        (make(window=9).state_dict(), r"saved with window=9. Found 4 here.*settings"),
        (make(below="keep").state_dict(), "saved with below='keep'. Found 'absorb' here"),
    ]
    for state, message in wrong:
        with pytest.raises(gr.errors.FileFormatError, match=message):
            made.load_state_dict(state)
    with pytest.raises(REFUSED, match="state"):
        made.load_state_dict([])
    assert made.state_dict()["calls"] == before["calls"]


def test_the_state_of_a_band_gate_belongs_to_its_directions() -> None:
    state = gate().state_dict()
    assert state["directions"] == {
        "version": 0, "step": 0, "pair_hash": "0" * 64, "estimator": "mean_difference", "control": None,
        "seed": None,
    }  # fmt: skip
    directions = scoring_directions(hack=[5.0, 7.0], clean=[1.0, 3.0])
    directions.update_(scoring_directions(hack=[5.0, 7.0], clean=[1.0, 3.0]), step=4)
    with pytest.raises(gr.errors.FileFormatError, match="saved with version=0. Found 1 here.*load the Directions"):
        gr.BandGate(directions).load_state_dict(state)
    control = scoring_directions(hack=[5.0, 7.0], clean=[1.0, 3.0]).random_like(seed=0)
    with pytest.raises(gr.errors.FileFormatError, match="estimator='mean_difference'. Found 'random'"):
        gr.BandGate(control).load_state_dict(state)


# What a card says of a gate


def test_a_gate_says_what_it_reads_and_which_rows_train_which_block() -> None:
    directions = scoring_directions(hack=[6.0], clean=[2.0])
    said = {
        gr.LabelGate(): ("flags", "classic: flagged rows train the quarantine only (route), the others both"),
        gr.LabelGate(below="keep"): ("flags", "exclusive: flagged rows train the quarantine only (route), the others"),
        ThresholdGate(0.5): ("scores", "classic: "),
        gr.BandGate(directions, below="keep"): ("scores", "exclusive: "),
        gr.BandGate(directions, soft=True): ("scores", "soft: m = 1, g_d = 1 - f, g_q = f, with f = z clamped"),
        gr.QuantileGate(directions): ("features", "keep, absorb and route: the lower tail trains the deployed block"),
    }
    for made, (reads, sentence) in said.items():
        assert made.reads == reads
        assert made.describe().startswith(sentence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_half_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    """In bf16 the z of 0.7438 is 0.742: the row would not be routed, and a soft weight be off by 0.2 %."""
    directions, scores = scoring_directions(hack=[5.03], clean=[1.01]), torch.tensor([4.0, 1.0], dtype=dtype)
    assert gr.BandGate(directions, threshold=0.7435)(scores).routed.tolist() == [True, False]
    mask = gr.BandGate(directions, soft=True)(scores)
    assert mask.g_q.dtype == torch.promote_types(dtype, torch.float32)
    assert mask.g_q.tolist() == pytest.approx([2.99 / 4.02, 0.0], abs=1e-6)

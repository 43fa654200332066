"""The founding bug: a refresh was asked for, could not reach what it was to refresh, and the run looked fine.

Extractor x gate x target of the refresher: in every combination where the gate would not see fresh directions of the
trained model, something raises before two refreshes' worth of steps; in every other one, the gate's view changes.
"""

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from support.language_models import PAIRS, Mixer, ids_only, optimizer_for, routed_mixer, train_step

import gradroute as gr
from gradroute.gates.quantile import QuantileGate
from gradroute.gates.threshold import ThresholdGate

EVERY = 2
REFUSED = (gr.GradRouteError, TypeError)


def activations(model: Mixer) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)


def gradients(model: Mixer) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)


SOURCES = {"activation": activations, "gradient": gradients}


def nothing(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    return lambda: None


def live(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    return lambda: source(model)


def of_a_copy(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    frozen = copy.deepcopy(model)
    return lambda: source(frozen)


def of_an_ablated_copy(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    frozen = copy.deepcopy(model)

    def extract() -> gr.Directions:
        with gr.ablate_quarantine(frozen):
            return source(frozen)

    return extract


def a_cache(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    with gr.ablate_quarantine(model):
        kept = source(model)
    return lambda: kept


def of_default_pairs(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    extract = gr.extract_activation_directions if source is activations else gr.extract_gradient_directions
    return lambda: extract(model, PAIRS[::-1], forward_fn=ids_only)


def of_other_features(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    return lambda: (gradients if source is activations else activations)(model)


def of_the_base_model(model: Mixer, source) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    def extract() -> gr.Directions:
        with gr.disable_adapters(model):
            return source(model)

    return extract


EXTRACTORS = {
    each.__name__: each
    for each in (
        live, nothing, of_a_copy, of_an_ablated_copy, a_cache, of_default_pairs, of_other_features, of_the_base_model
    )
}  # fmt: skip

GATES: dict[str, Callable[[gr.Directions], object]] = {
    "band": gr.BandGate,
    "soft band": lambda d: gr.BandGate(d, soft=True),
    "quantile": lambda d: QuantileGate(d, warm_up=1),
    "label": lambda d: gr.LabelGate(),
    "threshold": lambda d: ThresholdGate(0.0),
}

# What is refreshed, given the directions that were extracted: (the refresher's target, the gate's directions).
TARGETS: dict[str, Callable[[gr.Directions], tuple[object, gr.Directions]]] = {
    "the gate's": lambda d: (d, d),
    "none": lambda d: (None, d),
    "a copy": lambda d: (copy.deepcopy(d), d),
    "what the gate had before it was copied": lambda d: (d, copy.deepcopy(d)),
    "rows": lambda d: (d.rows, d),
}

CALLS = {"called": True, "never called": False}


def run(source: str, extractor: str, gate: str, target: str, call: str) -> None:
    """Two refreshes' worth of steps; returns only if the gate saw both."""
    torch.manual_seed(0)
    model = routed_mixer()
    optimizer = optimizer_for(model)
    with gr.ablate_quarantine(model):
        directions = SOURCES[source](model)
    refreshed, held = TARGETS[target](directions)
    made = GATES[gate](held)
    extract = EXTRACTORS[extractor](model, SOURCES[source])
    refresher = gr.Refresher(refreshed, extract, model=model, every=EVERY)
    refresher.watch(optimizer, made)
    scores = [held.score(held.hack)]
    for step in range(2 * EVERY):
        train_step(model, optimizer, seed=step)
        if CALLS[call]:
            refresher.step()
    scores.append(held.score(held.hack))
    assert held.version == 2
    assert not torch.allclose(*scores)


WORKS = {"extractor": "live", "target": "the gate's", "call": "called"}
REACHED = {"band", "soft band", "quantile"}
ALL = list(product(SOURCES, EXTRACTORS, GATES, TARGETS, CALLS))


def works(extractor: str, gate: str, target: str, call: str) -> bool:
    return {"extractor": extractor, "target": target, "call": call} == WORKS and gate in REACHED


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gradroute.GradRouteWarning")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("gate", GATES)
def test_every_combination_in_which_the_refresh_does_not_arrive_raises(source: str, gate: str) -> None:
    for extractor, target, call in product(EXTRACTORS, TARGETS, CALLS):
        if works(extractor, gate, target, call):
            run(source, extractor, gate, target, call)
            continue
        with pytest.raises(REFUSED) as raised:
            run(source, extractor, gate, target, call)
        assert not isinstance(raised.value, gr.errors.DeadDirectionError), (extractor, target, call, raised.value)


def test_some_combinations_work_and_most_do_not() -> None:
    working = [each for each in ALL if works(*each[1:])]
    assert len(working) == len(SOURCES) * len(REACHED) == 6
    assert len(ALL) == 2 * 8 * 5 * 5 * 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"target": "none"}, "`directions`|directions"),
        ({"target": "a copy"}, "no refresh reaches it"),
        ({"target": "what the gate had before it was copied"}, "no refresh reaches it"),
        ({"gate": "label"}, "A watched LabelGate should hold .* Found no directions"),
        ({"gate": "threshold"}, "A watched ThresholdGate should hold .* Found no directions"),
        ({"extractor": "nothing"}, "`extract` should return Directions. Found NoneType"),
        ({"extractor": "of_a_copy"}, "quarantine ablated. Found 'on'"),
        ({"extractor": "of_an_ablated_copy"}, "bitwise the same"),
        ({"extractor": "a_cache"}, "bitwise the same"),
        ({"extractor": "of_default_pairs"}, "pair_hash"),
        ({"extractor": "of_other_features"}, "should have the source"),
        ({"extractor": "of_the_base_model"}, "Found 'disabled'"),
        ({"call": "never called"}, "Found 1 optimizer steps and 0 of the refresher"),
    ],
)
def test_one_thing_broken_is_named(broken: dict[str, str], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        run(**{"source": "activation", "gate": "band", **WORKS, **broken})

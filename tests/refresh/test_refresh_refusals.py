"""`Refresher` raises where a refresh would change nothing, or not what it should."""

import copy

import pytest
from support.language_models import PAIRS, Mixer, ids_only, routed_mixer
from support.refreshing import REFUSED, ablated, activations, move, refresher
from torch import nn

import gradroute as gr

pytestmark = pytest.mark.touches_peft


def test_no_directions_to_refresh_raise() -> None:
    """The event that founded this library: an arm without directions, and a refresh that never happened."""
    model = routed_mixer()
    with pytest.raises(REFUSED, match="directions"):
        gr.Refresher(None, lambda: activations(model), model=model, every=5)


@pytest.mark.parametrize("extract", [None, "directions"])
def test_an_extract_that_is_no_function_raises(extract: object) -> None:
    model = routed_mixer()
    with pytest.raises(REFUSED, match="extract"):
        gr.Refresher(ablated(model), extract, model=model)


def test_directions_in_the_place_of_extract_raise() -> None:
    model = routed_mixer()
    with pytest.raises(REFUSED, match="extract"):
        gr.Refresher(ablated(model), activations(model), model=model)


@pytest.mark.parametrize("every", [0, -1, True, 2.5, None])
def test_a_schedule_without_steps_raises(every: object) -> None:
    with pytest.raises(REFUSED, match="every"):
        refresher(routed_mixer(), every=every)


def test_a_model_without_blocks_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="`model` should contain routed layers"):
        gr.Refresher(ablated(routed_mixer()), lambda: None, model=Mixer())


@pytest.mark.parametrize("returned", [None, {"rows": 1}])
def test_an_extract_that_returns_no_directions_raises(returned: object) -> None:
    model = routed_mixer()
    made = refresher(model, lambda: returned, every=1)
    move(model)
    with pytest.raises(
        gr.errors.RefreshError, match=f"`extract` should return Directions. Found {type(returned).__name__}"
    ):
        made.step()


def test_an_extract_that_returns_the_same_object_raises() -> None:
    model = routed_mixer()
    made = refresher(model, lambda: made.directions, every=1)
    for moved in (False, True):
        if moved:
            move(model)
        with pytest.raises(gr.errors.RefreshError, match="very object|bitwise the same"):
            made.step()
    assert made.directions.version == 0


@pytest.mark.corner(
    "`extract` returns cached features of an earlier policy", "`RefreshError` once the deployed parameters have moved"
)
def test_a_stale_cache_raises_once_the_deployed_parameters_moved() -> None:
    model = routed_mixer()
    cache = ablated(model)
    made = refresher(model, lambda: cache, every=1)
    assert not made.step().moved
    move(model, by=1e-6)
    with pytest.raises(
        gr.errors.RefreshError, match="deployed parameters moved .* bitwise the same.*Fix: .*copy or a cache"
    ):
        made.step()
    assert made.directions.version == 1


def test_features_that_do_not_depend_on_the_trained_blocks_raise() -> None:
    model = routed_mixer()

    def inputs() -> gr.Directions:
        return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input")

    gr.attach(gr.detach(model), r=2, target_modules=["q"])
    with gr.ablate_quarantine(model):
        directions = inputs()
    made = gr.Refresher(directions, inputs, model=model)
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="features that depend on the trained blocks"):
        made.refresh()


@pytest.mark.corner("`extract` reads a copy of the model that is not trained", "`RefreshError`")
def test_extraction_from_a_copy_of_the_model_raises() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = refresher(model, lambda: activations(frozen))
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="quarantine ablated. Found 'on'.*the model that was given"):
        made.refresh()


def test_extraction_from_an_ablated_copy_of_the_model_raises() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = refresher(model, lambda: ablated(frozen))
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same.*copy"):
        made.refresh()


def test_an_ablated_copy_is_found_out_by_the_second_refresh_where_the_first_directions_are_of_the_on_view() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = gr.Refresher(activations(model), lambda: ablated(frozen), model=model)
    move(model)
    made.refresh()
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same.*copy"):
        made.refresh()


def test_a_view_that_extract_opens_itself_raises() -> None:
    model = routed_mixer()

    def disabled() -> gr.Directions:
        with gr.disable_adapters(model):
            return activations(model)

    made = refresher(model, disabled)
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="`extract` should measure `model` .* Found 'disabled'"):
        made.refresh()


def test_a_refresh_inside_disabled_adapters_raises() -> None:
    model = routed_mixer()
    made = refresher(model)
    move(model)
    with gr.disable_adapters(model), pytest.raises(gr.errors.RefreshError, match="Found 'disabled'"):
        made.refresh()


def test_extraction_from_other_pairs_raises() -> None:
    model = routed_mixer()
    made = refresher(model, lambda: gr.extract_activation_directions(model, PAIRS[:2], forward_fn=ids_only))
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="`fresh` should have the pair_hash"):
        made.refresh()


def test_extraction_with_other_settings_raises() -> None:
    model = routed_mixer()
    made = refresher(
        model, lambda: gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, reduction="last")
    )
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="`fresh` should have the reduction"):
        made.refresh()


@pytest.mark.corner("two refreshers update the same directions", "`RefreshError`")
def test_two_refreshers_of_the_same_directions_raise() -> None:
    model = routed_mixer()
    first = refresher(model)
    second = gr.Refresher(first.directions, first.extract, model=model)
    move(model)
    first.refresh()
    with pytest.raises(gr.errors.RefreshError, match="updated by this refresher alone. Found version 1 instead of 0"):
        second.refresh()


def test_extraction_with_other_names_of_the_modules_is_refused_for_that() -> None:
    """A wrapper around the model names them otherwise; that no name is shared does not make features the same."""
    model = routed_mixer()
    wrapped = nn.Sequential(model)
    made = refresher(model, lambda: gr.extract_activation_directions(wrapped, PAIRS, forward_fn=ids_only))
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="should have the same modules"):
        made.refresh()

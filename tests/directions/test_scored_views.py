"""`Directions.score` compares view and base model of a capture with those of the directions; captures know both."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from support.captured_batches import IDS, POOL, batch_loss
from support.language_models import MODULES, PAIRS, Mixer, extracted, ids_only, routed_mixer
from torch import Tensor, nn

import gradroute as gr
from gradroute.directions import Capture

pytestmark = pytest.mark.touches_peft


def activations(model: Mixer, **settings: object) -> Capture:
    with torch.no_grad(), gr.capture_activations(model, pool=POOL, **settings) as capture:
        model(IDS)
    return capture


def gradients(model: Mixer, **settings: object) -> Capture:
    with gr.capture_gradients(model, **settings) as capture:
        batch_loss(model, IDS).backward()
    return capture


VIEWS = {
    "on": lambda model: nullcontext(),
    "ablated": gr.ablate_quarantine,
    "scaled 0.5": lambda model: gr.ablate_quarantine(model, 0.5),
    "scaled 0.2": lambda model: gr.ablate_quarantine(model, 0.2),
    "disabled": gr.disable_adapters,
}


# Which view


@pytest.mark.parametrize("view", VIEWS)
def test_a_capture_and_an_extraction_know_their_view(view: str) -> None:
    model = routed_mixer()
    with VIEWS[view](model):
        capture = activations(model)
        directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    assert capture.view == directions.provenance.view == view
    assert f"{view} view" in repr(capture)
    assert directions.score(capture).shape == (3,)


def test_features_of_modules_that_are_not_routed_know_the_view_too() -> None:
    model = routed_mixer()
    with gr.ablate_quarantine(model):
        capture = activations(model, features="output", modules=["head"])
    assert capture.view == "ablated"
    assert activations(Mixer().double(), features="output", modules=["head"]).view == "disabled"


@pytest.mark.parametrize("capture", [activations, gradients])
def test_the_view_in_which_the_forward_ran_counts_and_not_that_around_the_capture(capture: object) -> None:
    model = routed_mixer()
    model.forward = lambda ids, forward=model.forward: forward_ablated(model, forward, ids)
    assert capture(model).view == "ablated"


def forward_ablated(model: nn.Module, forward: object, ids: Tensor) -> Tensor:
    with gr.ablate_quarantine(model):
        return forward(ids)


@pytest.mark.corner(
    "rollouts are captured in another view than the directions", "`GradRouteError`, unless `score` is told the view"
)
@pytest.mark.parametrize(
    ("taken", "made"), [("on", "ablated"), ("ablated", "on"), ("scaled 0.5", "on"), ("scaled 0.2", "scaled 0.5")]
)
def test_a_capture_in_another_view_than_the_directions_raises(taken: str, made: str) -> None:
    """The scores differ a lot: 4.1 where 7.9 was right."""
    model = routed_mixer()
    with VIEWS[made](model):
        directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    with VIEWS[taken](model):
        capture = activations(model)
    with pytest.raises(gr.GradRouteError, match=f"view of the directions, '{made}'. Found '{taken}'. Fix: .*ablate"):
        directions.score(capture)
    assert torch.equal(directions.score(capture, view=taken), directions.score(dict(capture)))


def test_gradients_in_another_view_than_the_directions_raise() -> None:
    model = routed_mixer()
    with gr.ablate_quarantine(model):
        directions = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, features="parameter")
    products = gradients(model, features="parameter", directions=directions)
    with pytest.raises(gr.GradRouteError, match="'ablated'. Found 'on'"):
        directions.score(products)
    assert directions.score(products, view="on").shape == (3,)


def test_a_stated_view_is_checked() -> None:
    model, directions = routed_mixer(), extracted()
    with gr.ablate_quarantine(model):
        capture = activations(model)
    with pytest.raises(gr.GradRouteError, match="captured in the given view, 'on'. Found 'ablated'"):
        directions.score(capture, view="on")
    with pytest.raises(gr.GradRouteError, match="`view` should come with a Capture.*Found 'on' and a dict"):
        directions.score(dict(capture), view="on")


@pytest.mark.parametrize(
    "control", [lambda d: d.random_like(0), gr.directions.reversed_sign], ids=["random", "reversed"]
)
def test_a_control_compares_views_as_the_real_directions_do(control: object) -> None:
    made = control(extracted())
    with pytest.raises(gr.GradRouteError, match="'ablated'. Found 'on'"):
        made.score(activations(routed_mixer()))


def test_a_refresh_brings_its_view() -> None:
    model = routed_mixer()
    directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    capture = activations(model)
    directions.score(capture)
    directions.update_(extracted(), step=1)
    with pytest.raises(gr.GradRouteError, match="'ablated'. Found 'on'"):
        directions.score(capture)


@pytest.mark.corner("layers of one capture are in different views", "`GradRouteError`")
@pytest.mark.parametrize("names", [None, ["out"]])
def test_layers_in_different_views_raise(names: list[str] | None) -> None:
    """Also where the layers that are read are in one view, and one below them is not."""
    model = routed_mixer()
    with (
        gr.ablate_quarantine(model.q),
        pytest.raises(gr.GradRouteError, match=r"one view .* Found \['ablated', 'on'\]"),
    ):
        activations(model, modules=names)
    with gr.ablate_quarantine(model.q), pytest.raises(gr.GradRouteError, match="one view"):
        gradients(model, modules=names)
    with gr.ablate_quarantine(model.q), pytest.raises(gr.GradRouteError, match="one view"):
        gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, modules=names)


def test_forwards_in_different_views_raise() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="forwards of a capture .* one view. Found 'on', then 'ablated' in `q`"):
        with torch.no_grad(), gr.capture_activations(model, pool=POOL):
            model(IDS)
            with gr.ablate_quarantine(model):
                model(IDS)


def test_batches_of_an_extraction_in_different_views_raise() -> None:
    model, calls = routed_mixer(), []

    def forward(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(len(ids))
        with gr.ablate_quarantine(model) if len(calls) > 1 else nullcontext():
            return model(ids)

    with pytest.raises(gr.GradRouteError, match=r"All batches .* one view. Found \['ablated', 'on'\]"):
        gr.extract_activation_directions(model, PAIRS, forward_fn=forward, batch_size=4)


# Which model


@pytest.mark.corner("directions of another base model whose modules have the same names", "`GradRouteError`")
def test_a_capture_of_another_base_model_raises() -> None:
    """With the same module names and widths the scores would be of nothing."""
    directions, stranger = extracted(), routed_mixer(seed=1)
    with gr.ablate_quarantine(stranger):
        capture = activations(stranger)
    with pytest.raises(gr.GradRouteError, match="base model that the directions were extracted from. Found another"):
        directions.score(capture)
    assert directions.score(dict(capture)).shape == (3,)


def test_other_blocks_on_the_same_base_are_scored() -> None:
    directions, model = extracted(), routed_mixer()
    gr.detach(model)
    gr.attach(model, r=2, lora_alpha=4.0, target_modules=MODULES, seed=7)
    with gr.ablate_quarantine(model):
        assert directions.score(activations(model)).shape == (3,)


def test_a_base_that_was_written_to_or_replaced_is_another_one() -> None:
    """The identity is remembered by parameter and not by model."""
    changes = {
        "in place": lambda m: nn.init.ones_(m.embed.weight),
        "data": lambda m: setattr(m.embed.weight, "data", m.embed.weight.data * 2),
        "parameter": lambda m: setattr(m.embed, "weight", nn.Parameter(m.embed.weight.detach() * 2, False)),
        "state dict": lambda m: m.load_state_dict(routed_mixer(seed=3).state_dict()),
    }
    for how, change in changes.items():
        model, directions = routed_mixer(), extracted()
        with gr.ablate_quarantine(model):
            directions.score(activations(model))
            change(model)
            with pytest.raises(gr.GradRouteError, match="base model"):
                directions.score(activations(model))
                pytest.fail(how)


def test_the_identity_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, directions, read = routed_mixer(), extracted(), []
    with gr.ablate_quarantine(model):
        directions.score(activations(model))
        monkeypatch.setattr(gr._hashing, "_base_name", lambda name: read.append(name) or name)
        directions.score(activations(model))
    assert read == []


# Copies and files


def test_directions_and_captures_are_copied_and_pickled() -> None:
    model, directions = routed_mixer(), extracted(estimator="ridge")
    with gr.ablate_quarantine(model):
        capture = activations(model)
    scores = directions.score(capture)
    for again in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        assert torch.equal(again(directions).score(again(capture)), scores)
        assert again(capture).view == "ablated"
        # A copy holds the features and not the model.
        assert len(pickle.dumps(again(capture))) < 20_000

"""Gradients of gains and of parameters per rollout: exact, without forming them when scoring, at B = 0 and split."""

import inspect

import pytest
import torch
from support.language_models import MODULES, PAIRS, Mixer, ids_only, optimizer_for, routed_mixer, tiny_llama, train_step
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradroute as gr
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 0, 2, 4, 6]])


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def row_loss(model: Mixer, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")


def batch_loss(model: Mixer, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def blocks(layer: gr.QuarantineLoRA) -> list[nn.Parameter]:
    return list(layer.block_parameters("deployed"))


def with_zero_B(model: Mixer) -> Mixer:
    with torch.no_grad():
        for name in MODULES:
            model.get_submodule(name).deployed.B.zero_()
    return model


def split(model: Mixer) -> Mixer:
    """A = [V; 0], B = [0, U]: zero net delta with half of each gradient alive."""
    with torch.no_grad():
        for name in MODULES:
            A, B, _ = model.get_submodule(name).deployed
            A[1:], B[:, :1] = 0, 0
    return model


START = {"trained": lambda model: model, "B = 0": with_zero_B, "split": split}
each_start = pytest.mark.parametrize("start", START)


def parameter_directions(model: Mixer, **settings: object) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, features="parameter", **settings)


def captured(model: Mixer, directions: gr.Directions | None = None) -> gr.directions.Capture:
    with gr.capture_gradients(model, features="parameter", directions=directions) as capture:
        batch_loss(model, IDS).backward()
    return capture


# Gain read-out


def test_the_read_out_of_lora_is_its_scaled_B() -> None:
    layer = routed_mixer().q
    assert torch.equal(layer.gain_readout, layer.deployed.scaling * layer.deployed.B)


def svd_mixer(gain: float) -> Mixer:
    torch.manual_seed(0)
    model = Mixer().double()
    gr.attach(model, r=2, lora_alpha=3.0, target_modules=MODULES, parametrization="svd_gain")
    with torch.no_grad():
        for name in MODULES:
            model.get_submodule(name).gain.fill_(gain)
    return model


@pytest.mark.parametrize("gain", [0.0, 0.4])
def test_the_bottleneck_gradient_of_svd_gains_is_that_of_the_gains_also_at_zero(gain: float) -> None:
    model = svd_mixer(gain)
    with gr.capture_gradients(model) as capture:
        batch_loss(model, IDS).backward()
    for i in range(3):
        gains = [model.get_submodule(name).gain for name in MODULES]
        for name, expected in zip(MODULES, torch.autograd.grad(row_loss(model, IDS[i : i + 1]), gains), strict=True):
            assert expected.abs().min() > 1e-9
            exact(capture[name][i], expected)
    assert gain or not model.q.deployed.B.any()


def test_svd_gains_have_gradient_directions_at_their_start() -> None:
    made = gr.extract_gradient_directions(svd_mixer(0.0), PAIRS, forward_fn=ids_only)
    hack, clean = made.pair_scores()
    assert hack.mean() > clean.mean()


def test_the_parameters_of_svd_gains_are_their_gains() -> None:
    model = svd_mixer(0.3)
    directions = parameter_directions(model)
    bottleneck = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    for name in MODULES:
        assert torch.equal(directions.rows[name], bottleneck.rows[name])
    exact(directions.score(captured(model, directions)), directions.score(captured(model)))


def test_layers_that_train_neither_matrices_nor_gains_have_no_parameter_features() -> None:
    model = routed_mixer()
    model.k.block_parameters = lambda block: iter([model.k.lora_A])
    with pytest.raises(gr.GradRouteError, match="`k` should train LoRA matrices or gains. Found a QuarantineLoRA"):
        captured(model)


def test_the_read_out_of_low_precision_is_not_rounded_again() -> None:
    model = routed_mixer(torch.bfloat16)
    scaling, B = model.q.deployed.scaling, model.q.deployed.B
    assert model.q.gain_readout.dtype == torch.float32
    assert torch.equal(model.q.gain_readout, scaling * B.float())


# Parameter gradients


@each_start
def test_parameter_features_are_the_gradients_of_A_and_B_of_each_rollout(start: str) -> None:
    model = START[start](routed_mixer())
    capture = captured(model)
    for name in MODULES:
        parameters = blocks(model.get_submodule(name))
        for i in range(3):
            gradients = torch.autograd.grad(row_loss(model, IDS[i : i + 1]), parameters)
            expected = torch.cat([g.flatten() for g in gradients])
            assert expected.any()
            exact(capture[name][i], expected)


@each_start
def test_the_ghost_product_is_the_inner_product_with_the_parameter_gradient(start: str) -> None:
    model = START[start](routed_mixer())
    directions = parameter_directions(model)
    full, ghost = captured(model), captured(model, directions)
    for name in MODULES:
        assert ghost[name].shape == (3, 1)
        exact(ghost[name][:, 0], full[name] @ directions.rows[name][0])
    assert full["q"].shape == (3, 2 * (6 + 6))
    scores = directions.score(full)
    assert scores.abs().min() > 1e-6
    exact(directions.score(ghost), scores)


@pytest.mark.parametrize("estimator", [MeanDifference(standardise=True), Ridge(), Svd(k=2)], ids=str)
def test_scores_of_ghost_products_take_centre_scale_and_all_rows(estimator: object) -> None:
    model = routed_mixer()
    directions = parameter_directions(model, estimator=estimator)
    exact(directions.score(captured(model, directions)), directions.score(captured(model)))


def test_ghost_products_need_no_inputs_of_full_width_and_form_no_gradient() -> None:
    """Kept until backward: 2 r numbers per token and module, on top of what the model itself keeps."""
    model = routed_mixer()
    directions = parameter_directions(model)
    model.requires_grad_(False)

    def kept(directions: gr.Directions | None) -> int:
        from gradroute.directions import capture as module

        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("ghost_product", "parameter_gradient"):
                original = getattr(module, name)

                def watched(*args: object, original: object = original) -> object:
                    read = original(*args)
                    held = [
                        c.cell_contents for c in inspect.unwrap(read).__closure__ if isinstance(c.cell_contents, Tensor)
                    ]
                    sizes.append(sum(t.numel() for t in held if t.shape[0] == 3))
                    return read

                patch.setattr(module, name, watched)
            captured(model, directions)
        return max(sizes)

    assert kept(directions) == 2 * 2 * 15
    assert kept(None) == 6 * 15


@each_start
@pytest.mark.parametrize("reentrant", [None, False])
def test_checkpointing_and_frozen_parameters_change_nothing(start: str, reentrant: bool | None) -> None:
    model = START[start](routed_mixer())
    directions = parameter_directions(model)
    plain = captured(model, directions)
    model.requires_grad_(False)
    model.reentrant = reentrant
    again = captured(model, directions)
    for name in MODULES:
        exact(again[name], plain[name])


def test_rollouts_without_a_token_axis() -> None:
    from support.models import routed_tower

    model, x = routed_tower(), torch.randn(3, 5, dtype=torch.float64)
    found = {}
    for name, inputs in (("rows", x), ("tokens", x[:, None])):
        with gr.capture_gradients(model, features="parameter") as found[name]:
            model(inputs).pow(2).sum().backward()
    for name in ("lower", "upper"):
        exact(found["rows"][name], found["tokens"][name])


# Directions in parameter shape


def test_a_parameter_direction_is_one_backward_of_the_paired_difference() -> None:
    from support.language_models import completion_nll

    model = with_zero_B(routed_mixer())
    difference = sum(
        completion_nll(model, [*p.prompt], [*p.hack]) - completion_nll(model, [*p.prompt], [*p.clean]) for p in PAIRS
    )
    found = parameter_directions(model)
    for name in MODULES:
        gradients = torch.autograd.grad(difference, blocks(model.get_submodule(name)), retain_graph=True)
        flat = torch.cat([g.flatten() for g in gradients])
        exact(found.rows[name][0], flat / flat.norm())


@pytest.mark.parametrize("start", ["B = 0", "split"])
def test_a_gradient_gate_works_where_the_bottleneck_gradient_vanishes(start: str) -> None:
    model = START[start](routed_mixer())
    with pytest.raises(gr.errors.DeadDirectionError, match='features="parameter"|pairs differ'):
        gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    directions = parameter_directions(model)
    hack, clean = directions.pair_scores()
    assert hack.mean() > clean.mean()
    gate = gr.BandGate(directions)
    mask = gate(directions.score(captured(model, directions)))
    assert mask.routed.shape == (3,)
    control = directions.random_like(seed=1, oriented=True)
    assert control.score(captured(model, control)).shape == (3,)
    assert not torch.allclose(control.score(captured(model, control)), directions.score(captured(model, directions)))


def test_parameter_directions_are_refreshed_and_so_is_their_control() -> None:
    model = with_zero_B(routed_mixer())
    optimizer = optimizer_for(model)
    with gr.ablate_quarantine(model):
        directions = parameter_directions(model)
    control = directions.random_like(seed=1)
    rows = dict(control.rows)
    refreshers = [
        gr.Refresher(d, lambda: parameter_directions(model), model=model, every=1) for d in (directions, control)
    ]
    train_step(model, optimizer)
    stale = captured(model, directions)
    model.zero_grad()
    for refresher in refreshers:
        assert refresher.step().moved
    assert all(torch.equal(control.rows[name], rows[name]) for name in MODULES)
    with pytest.raises(gr.GradRouteError, match="in version 1. Found version 0 of these.*between two refreshes"):
        directions.score(stale, view="on")
    model.zero_grad()
    assert torch.isfinite(directions.score(captured(model, directions), view="on")).all()


def test_products_with_other_directions_are_not_scored() -> None:
    model = routed_mixer()
    directions = parameter_directions(model)
    with pytest.raises(gr.GradRouteError, match="with these directions in version 0. Found other directions"):
        directions.random_like(seed=0).score(captured(model, directions))


def test_pair_gradients_are_kept_on_the_cpu_one_number_per_parameter_and_side() -> None:
    model = routed_mixer()
    found = parameter_directions(model)
    deployed = sum(p.numel() for _, p in gr.deployed_parameters(model))
    kept = sum(f.numel() for side in (found.hack, found.clean) for f in side.values())
    assert kept == 2 * len(PAIRS) * deployed
    assert {f.device.type for f in found.hack.values()} == {"cpu"}
    fewer = parameter_directions(model, modules=["q", "out"])
    assert list(fewer.rows) == ["q", "out"]
    assert list(captured(model, fewer)) == ["q", "out"]


def test_a_hugging_face_model_has_parameter_directions() -> None:
    found = gr.extract_gradient_directions(tiny_llama(), PAIRS, features="parameter")
    single = gr.extract_gradient_directions(tiny_llama(), PAIRS, features="parameter", batch_size=1)
    for name in found.rows:
        torch.testing.assert_close(found.hack[name], single.hack[name], rtol=1e-3, atol=1e-5)


# What is refused


def test_parameters_have_no_activation() -> None:
    with pytest.raises(gr.GradRouteError, match='`features="parameter"` is a gradient'):
        gr.extract_activation_directions(routed_mixer(), PAIRS, forward_fn=ids_only, features="parameter")


@pytest.mark.parametrize("settings", [{"features": "bottleneck"}, {"features": "parameter", "modules": ["q"]}])
def test_directions_go_with_parameter_features_alone(settings: dict) -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="`directions` needs features=.parameter., all modules. Found "):
        with gr.capture_gradients(model, directions=parameter_directions(model), **settings):
            pass


def test_directions_of_another_shape_raise() -> None:
    model = routed_mixer()
    bottleneck = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    with pytest.raises(gr.GradRouteError, match="`directions` of `q` should be 24 wide. Found 2"):
        captured(model, bottleneck)


def test_disabled_adapters_have_no_parameter_gradient() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="`q` ran with adapters disabled: its parameter"):
        with gr.disable_adapters(model):
            captured(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_models_have_parameter_directions_and_ghost_products(architecture: str) -> None:
    from support.tiny_models import peft_model

    model, ids = peft_model(architecture, torch.float64), torch.tensor([[3, 4, 5, 6], [5, 6, 7, 8]])
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    scores = []
    for given in (directions, None):
        with gr.capture_gradients(model, features="parameter", directions=given) as capture:
            model(input_ids=ids).logits.log_softmax(-1)[..., 3].sum().backward()
        scores.append(directions.score(capture))
    exact(*scores)

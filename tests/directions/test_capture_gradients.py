"""Captured gradients of each rollout, against slow references in float64."""

import pytest
import torch
from support.captured_batches import FEATURES, IDS, batch_loss, exact
from support.language_models import MODULES, Mixer, gain_gradients, routed_mixer
from support.models import gradients, routed_tower
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradroute as gr

pytestmark = pytest.mark.touches_peft


def row_loss(model: Mixer, ids: Tensor) -> Tensor:
    """The summed loss of one rollout (1, seq)."""
    return cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")


def captured_gradients(model: Mixer, ids: Tensor, features: str = "bottleneck") -> dict[str, Tensor]:
    with gr.capture_gradients(model, features=features) as capture:
        batch_loss(model, ids).backward()
    return dict(capture)


def test_bottleneck_gradients_equal_a_per_rollout_reference() -> None:
    model = routed_mixer()
    reference = gain_gradients(model, [lambda i=i: row_loss(model, IDS[i : i + 1]) for i in range(3)])
    captured = captured_gradients(model, IDS)
    for name in MODULES:
        assert reference[name].abs().min() > 1e-6
        exact(captured[name], reference[name])


@pytest.mark.parametrize("features", FEATURES)
def test_a_batch_equals_its_rollouts_one_by_one(features: str) -> None:
    model = routed_mixer()
    batched = captured_gradients(model, IDS, features)
    with gr.capture_gradients(model, features=features) as solo:
        for i in range(3):
            row_loss(model, IDS[i : i + 1]).backward()
    for name in MODULES:
        assert not torch.allclose(batched[name][0], batched[name][1])
        exact(batched[name], solo[name])


def test_forwards_keep_their_order_when_one_backward_serves_them_all() -> None:
    model = routed_mixer()
    with gr.capture_gradients(model) as capture:
        losses = [row_loss(model, IDS[i : i + 1]) for i in (2, 0, 1)]
        sum(losses).backward()
    expected = captured_gradients(model, IDS)
    for name in MODULES:
        exact(capture[name], expected[name][[2, 0, 1]])


def test_two_backwards_through_one_forward_add_up() -> None:
    model = routed_mixer()
    with gr.capture_gradients(model) as capture:
        losses = [row_loss(model, IDS[:1]), row_loss(model, IDS[1:2])]
        losses[0].backward(retain_graph=True)
        (2 * losses[0]).backward()
        losses[1].backward()
    expected = captured_gradients(model, IDS)
    for name in MODULES:
        exact(capture[name], expected[name][:2] * torch.tensor([[3.0], [1.0]]))


def test_output_gradients_are_those_of_the_module_outputs() -> None:
    model, outputs = routed_mixer(), {}
    for name in MODULES:
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y}))
    loss = batch_loss(model, IDS)
    reference = torch.autograd.grad(loss, [outputs[name] for name in MODULES])
    captured = captured_gradients(model, IDS, "output")
    for name, gradient in zip(MODULES, reference, strict=True):
        exact(captured[name], gradient.sum(1))


def test_input_gradients_are_each_modules_own_part_of_a_shared_input() -> None:
    model, shared = routed_mixer(), []
    model.embed.register_forward_hook(lambda m, a, y: shared.append(y.detach().requires_grad_()) or shared[-1])
    with gr.capture_gradients(model, features="input") as capture:
        batch_loss(model, IDS).backward()
    whole = shared[0].grad.sum(1)
    # q, k and v read x, and so does the residual, whose gradient is that of the input of `out`.
    exact(sum(capture[name] for name in MODULES), whole)
    assert all(capture[name].abs().max() > 1e-4 and not torch.allclose(capture[name], whole) for name in MODULES)


def test_inputs_without_a_token_axis_have_gradient_features_too() -> None:
    model, x = routed_tower(), torch.randn(3, 5, dtype=torch.float64)
    with gr.capture_gradients(model) as tokens:
        model(x[:, None]).pow(2).sum().backward()
    with gr.capture_gradients(model) as rows:
        model(x).pow(2).sum().backward()
    for name in ("lower", "upper"):
        exact(rows[name], tokens[name])


@pytest.mark.parametrize("features", FEATURES)
def test_capture_leaves_parameter_gradients_bitwise_alone(features: str) -> None:
    model = routed_mixer()
    batch_loss(model, IDS).backward()
    plain = gradients(model)
    model.zero_grad()
    captured_gradients(model, IDS, features)
    assert plain.keys() == gradients(model).keys()
    assert all(torch.equal(plain[name], gradient) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("features", FEATURES)
def test_frozen_parameters_have_the_same_features(features: str) -> None:
    model = routed_mixer()
    trainable = captured_gradients(model, IDS, features)
    model.requires_grad_(False)
    frozen = captured_gradients(model, IDS, features)
    for name in MODULES:
        exact(frozen[name], trainable[name])


def test_a_route_gates_parameters_and_not_features() -> None:
    model = routed_mixer()
    plain = captured_gradients(model, IDS)
    model.zero_grad()
    with gr.route(model, gr.RouteMask.classic([True, True, True])):
        routed = captured_gradients(model, IDS)
    assert not gradients(model)["q.lora_B"].any()
    for name in MODULES:
        exact(routed[name], plain[name])


def test_an_ablated_quarantine_changes_the_features() -> None:
    model = routed_mixer()
    on = captured_gradients(model, IDS)
    with gr.ablate_quarantine(model):
        ablated = captured_gradients(model, IDS)
    with torch.no_grad():
        for _, parameter in gr.quarantine_parameters(model):
            parameter.zero_()
    reference = captured_gradients(model, IDS)
    for name in MODULES:
        exact(ablated[name], reference[name])
        assert not torch.allclose(on[name], ablated[name])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_checkpointing_gives_the_same_features(features: str, frozen: bool) -> None:
    model = routed_mixer()
    if frozen:
        model.requires_grad_(False)
    plain = captured_gradients(model, IDS, features)
    model.reentrant = False
    recomputed = captured_gradients(model, IDS, features)
    for name in MODULES:
        exact(recomputed[name], plain[name])


# What is refused


def test_gradients_off_raise() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="`q` ran with gradients off.*no_grad"):
        with torch.no_grad(), gr.capture_gradients(model):
            model(IDS)


def test_reentrant_checkpointing_raises() -> None:
    model = routed_mixer()
    model.reentrant = True
    model.embed.weight.requires_grad_()
    with pytest.raises(gr.GradRouteError, match="use_reentrant=False"):
        captured_gradients(model, IDS)


def test_a_block_without_backward_raises() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="and backward inside .*these did not: `q`, `k`, `v`"):
        with gr.capture_gradients(model):
            model(IDS)


def test_a_module_that_the_loss_does_not_see_raises() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="Found that these did not: `out`"):
        with gr.capture_gradients(model):
            x = model.embed(IDS)
            model.out(x)
            (model.q(x) + model.k(x) + model.v(x)).sum().backward()


def test_gradient_features_that_are_not_finite_raise() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="gradient features of `q` are not finite in row 0"):
        with gr.capture_gradients(model):
            (batch_loss(model, IDS) * float("inf")).backward()

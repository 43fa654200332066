"""`attach(..., parametrization="svd_gain")`: values, routed gradients and views of gains on singular directions."""

import copy

import pytest
import torch
from support.gain_towers import ALPHA, MASK, R_Q, UPSTREAM, R, X, attached, both_rotations, parameters, trained
from support.language_models import PAIRS, Mixer, ids_only
from support.models import Tower, gradients, normal, randomize_blocks, reference_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr
from gradroute._hashing import model_identity
from gradroute.adapters.svd_gain import cayley


def dense(layer: gr.adapters.SvdGain, x: Tensor, m: Tensor) -> Tensor:
    """The formula, with a decomposition of its own where signs do not matter; m has a value per row."""
    W = layer.base_layer.weight.detach()
    left, s, right = torch.linalg.svd(W, full_matrices=False)
    rotation = torch.eye(R_Q, dtype=torch.float64)
    if layer.rotate:
        # K reads the frozen directions with the signs that the layer has; its rows differ from `right` in sign alone.
        signs = (right[:R_Q] * layer.Vh[:R_Q]).sum(1).sign()
        K = torch.zeros(R_Q, R_Q, dtype=torch.float64)
        K = K.index_put((torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])), layer.rotation_quarantine)
        K, identity = K - K.T, torch.eye(R_Q, dtype=torch.float64)
        rotation = signs[:, None] * ((identity - K) @ torch.linalg.inv(identity + K)) * signs
    y = x @ W.T + layer.base_layer.bias
    y = y + ALPHA / R * (x @ right[:R].T * (s[:R] * layer.gain.tanh())) @ left[:, :R].T
    read = x @ (rotation @ right[:R_Q]).T
    return y + m[:, None] * (ALPHA / R_Q * (read * (s[:R_Q] * layer.gain_quarantine.tanh())) @ left[:, :R_Q].T)


# Values


@both_rotations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_equals_the_base_bitwise_at_initialisation(dtype: torch.dtype, rotate: bool) -> None:
    x = X.to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = Tower().to(dtype)(x)
    model = attached(dtype, rotate=rotate)
    assert torch.equal(model(x), expected)
    randomize_blocks(model)
    assert all(p.dtype == dtype and p.any() for p in parameters(model).values())
    assert not torch.equal(model(x), expected)


@both_rotations
def test_output_is_the_formula(rotate: bool) -> None:
    layer = trained(rotate).lower
    torch.testing.assert_close(layer(X), dense(layer, X, torch.ones(4)), rtol=0, atol=1e-12)
    with gr.ablate_quarantine(layer, scale=0.3):
        torch.testing.assert_close(
            layer(X), dense(layer, X, torch.full((4,), 0.3, dtype=torch.float64)), rtol=0, atol=1e-12
        )
    assert not torch.allclose(layer(X), dense(layer, X, torch.zeros(4)))


@pytest.mark.parametrize("r_quarantine", [1, 4])
def test_the_larger_rank_decides_how_many_triplets_are_kept(r_quarantine: int) -> None:
    layer = trained(r=2, r_quarantine=r_quarantine).upper
    k = max(2, r_quarantine)
    assert (layer.U.shape, layer.S.shape, layer.Vh.shape) == ((4, k), (k,), (k, 6))
    assert layer.deployed.A.shape == (2, 6)
    assert layer.quarantine.B.shape == (4, r_quarantine)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 4.0 / r_quarantine)


def test_all_gains_at_a_large_value_scale_the_whole_weight() -> None:
    layer = attached(r=4, r_quarantine=4, lora_alpha=2.0).upper
    with torch.no_grad():
        layer.gain.fill_(20.0)
    deployed = layer.deployed
    torch.testing.assert_close(deployed.B @ deployed.A, layer.base_weight(), rtol=0, atol=1e-12)


def test_without_rotation_the_quarantine_scales_the_deployed_axes_and_with_it_reads_others() -> None:
    for rotate in (False, True):
        layer = trained(rotate, r=3, r_quarantine=3).lower
        quarantine = layer.quarantine.B @ layer.quarantine.A
        in_singular_basis = layer.U.T @ quarantine @ layer.Vh.T
        off_diagonal = in_singular_basis - in_singular_basis.diagonal().diag()
        assert (off_diagonal.abs().max() < 1e-12) is not rotate
        torch.testing.assert_close(quarantine @ layer.Vh.T @ layer.Vh, quarantine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [2, 3, 6])
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_the_cayley_transform_is_a_rotation_and_zero_the_identity(r: int, size: float) -> None:
    entries = size * normal(r * (r - 1) // 2)
    rotation = cayley(entries, r)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(r).double(), rtol=0, atol=1e-10)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    assert not torch.allclose(rotation, torch.eye(r).double(), atol=1e-3)
    torch.testing.assert_close(cayley(-entries, r), rotation.T)
    assert torch.equal(cayley(torch.zeros_like(entries), r), torch.eye(r).double())
    assert torch.autograd.gradcheck(lambda e: cayley(e, r), 0.5 * normal(len(entries)).requires_grad_())


def test_each_entry_of_the_rotation_turns_its_own_plane() -> None:
    for i, (row, column) in enumerate([(1, 0), (2, 0), (2, 1)]):
        rotation = cayley(torch.eye(3).double()[i], 3)
        other = ({0, 1, 2} - {row, column}).pop()
        assert rotation[other, other] == 1
        assert rotation[row, column].item() == pytest.approx(-1)  # tan(90 degrees / 2) = 1


def test_a_bf16_rotation_is_computed_in_float32() -> None:
    entries = normal(6, dtype=torch.bfloat16)
    assert torch.equal(cayley(entries, 4), cayley(entries.float(), 4))
    model = trained(True, dtype=torch.bfloat16)
    layer = model.lower
    expected = (cayley(layer.rotation_quarantine, R_Q) @ layer.Vh[:R_Q].float()).bfloat16()
    assert torch.equal(layer.quarantine.A, expected)


# Gradients and gates


@both_rotations
def test_routed_gradients_are_those_of_every_row_weighted_by_its_gates(rotate: bool) -> None:
    model = trained(rotate)
    m, g_d, g_q = (torch.tensor(row).double() for row in ([0, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]))
    total = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
    deployed = dict(gr.deployed_parameters(model)).keys()
    for i in range(4):
        row = slice(i, i + 1)
        y = dense(model.upper, torch.tanh(dense(model.lower, X[row], m[row])), m[row])
        row_gradients = torch.autograd.grad((y * UPSTREAM[row]).sum(), list(parameters(model).values()))
        for name, gradient in zip(total, row_gradients, strict=True):
            total[name] += (g_d if name in deployed else g_q)[i] * gradient
    with gr.route(model, MASK):
        (model(X) * UPSTREAM).sum().backward()
    found = gradients(model)
    assert found.keys() == total.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, total[name], rtol=0, atol=1e-12)
        assert gradient.any()
    reference = reference_gradients(model, X, UPSTREAM, m, g_d, g_q)
    assert all(torch.allclose(reference[name], total[name]) for name in total)


@both_rotations
@pytest.mark.parametrize(("zone", "idle"), [("keep", "quarantine"), ("route", "deployed")])
def test_a_zone_leaves_the_other_block_without_gradient(zone: str, idle: str, rotate: bool) -> None:
    model = trained(rotate)
    with gr.route(model, gr.RouteMask.zones([zone] * 4)):
        model(X).square().sum().backward()
    quarantine = dict(gr.quarantine_parameters(model)).keys()
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) is ((name in quarantine) != (idle == "quarantine"))


def test_gains_learn_from_zero_and_the_rotation_once_they_have_moved() -> None:
    model = attached(rotate=True)
    optimizer = torch.optim.SGD(parameters(model).values(), lr=0.1)
    model(X).square().sum().backward()
    moving = {name: bool(gradient.any()) for name, gradient in gradients(model).items()}
    assert moving == {name: "rotation" not in name for name in parameters(model)}
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        model(X).square().sum().backward()
    assert all(gradient.any() for gradient in gradients(model).values())
    assert not torch.allclose(model.lower.quarantine.A, model.lower.Vh[:R_Q], atol=1e-6)


@both_rotations
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(use_reentrant: bool, rotate: bool) -> None:
    found = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model = trained(rotate)
        with gr.route(model, MASK):
            run(model, X.clone().requires_grad_()).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() == parameters(trained(rotate)).keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_under_autocast_the_output_is_bf16_and_gains_get_float32_gradients() -> None:
    model = trained(True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X.float())
    y.square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(X.float()), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters(model).values())


# Views


@both_rotations
def test_ablating_and_disabling_take_away_what_they_say(rotate: bool) -> None:
    model = trained(rotate)
    deployed_only = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (deployed_only.lower, deployed_only.upper):
            layer.gain_quarantine.zero_()
    on = model(X)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), gr.ablate_quarantine(model):
            torch.testing.assert_close(model(X), deployed_only(X), rtol=0, atol=1e-12)
    assert not torch.allclose(on, deployed_only(X))
    with gr.disable_adapters(model):
        base = model(X)
    assert torch.equal(base, gr.detach(model)(X))


@both_rotations
def test_merging_keeps_what_the_ablated_view_shows(rotate: bool) -> None:
    model = trained(rotate)
    on = model(X)
    with gr.ablate_quarantine(model):
        ablated = model(X)
    assert not torch.allclose(on, ablated)
    merged = gr.merge_deployed(model)
    assert type(merged.lower) is nn.Linear
    torch.testing.assert_close(merged(X), ablated, rtol=0, atol=1e-12)


def test_directions_can_be_extracted() -> None:
    torch.manual_seed(0)
    model = gr.attach(Mixer().double(), r=2, parametrization="svd_gain", target_modules=["q", "v"])
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
        inputs = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input")
    assert {name: tuple(rows.shape) for name, rows in directions.rows.items()} == {"q": (1, 2), "v": (1, 2)}
    torch.testing.assert_close(inputs.hack["q"] @ model.q.Vh.T, directions.hack["q"])


def test_the_base_model_is_the_same_before_and_after() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Tower().double()
    assert model_identity(trained(True)) == model_identity(base)

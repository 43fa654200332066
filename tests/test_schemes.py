"""Published schemes as masks, against each scheme written out in plain autograd; and their docstrings' examples."""

import doctest

import pytest
import torch
from support.models import Tower, gradients, routed_tower
from torch import Tensor

import gradroute as gr
from gradroute import schemes
from gradroute.advantages import clean_baseline_advantages, weighted_baseline_advantages
from gradroute.schemes import detach_mix_mask, expand_route_ablate_mask, graft_mask, sgtm_mask

REFUSED = (gr.GradRouteError, TypeError)
FLAGGED = torch.tensor([True, False, True, False, False])
X = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def branch(block, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return block.scaling * (x @ block.A.T @ block.B.T)


def parameter_gate(block, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """g(x) - (1-w) g(stopgrad x) + (1-w) stopgrad(g(x)): value g, parameter gradient times w, gradient to x whole."""
    w = weight[:, None]
    return branch(block, x) - (1 - w) * branch(block, x.detach()) + (1 - w) * branch(block, x).detach()


def run(model: Tower, layer_forward) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Gradients of a tower whose two layers are computed by `layer_forward(layer, x)`."""
    model.zero_grad()
    hidden = torch.tanh(layer_forward(model.lower, X))
    layer_forward(model.upper, hidden).square().sum().backward()
    return gradients(model)


def routed(model: Tower, mask: gr.RouteMask) -> dict[str, Tensor]:
    model.zero_grad()
    with gr.route(model, mask):
        model(X).square().sum().backward()
    return gradients(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], unlike: dict[str, Tensor]) -> None:
    assert any(not torch.allclose(expected[name], unlike[name]) for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_the_examples_in_the_docstrings() -> None:
    names = {"weighted_baseline_advantages": weighted_baseline_advantages}
    result = doctest.testmod(schemes, extraglobs=names, raise_on_error=True)
    assert result.attempted >= 7
    examples = [getattr(schemes, name).__doc__.count(">>>") for name in dir(schemes) if name.endswith("_mask")]
    assert len(examples) == 4
    assert all(examples)


# GRAFT


@pytest.mark.parametrize("scheme", ["classic", "exclusive"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("sizes", [(1.0, 1.0), (2.0, 3.0), (10.0, 1.0)])
def test_graft_equals_its_parameter_gates(scheme: str, strength: float, sizes: tuple[float, float]) -> None:
    model = routed_tower()
    n_d, n_q = sizes
    kappa_d, kappa_q = min((n_d + n_q) / n_d, 4.0), min((n_d + n_q) / n_q, 4.0)
    w_d, w_q = [], []
    for flag in FLAGGED.tolist():
        if flag:
            w_d, w_q = [*w_d, 1 - strength], [*w_q, 1 + strength * (kappa_q - 1)]
        elif scheme == "classic":
            w_d, w_q = [*w_d, 1.0], [*w_q, 1.0]
        else:
            w_d, w_q = [*w_d, 1 + strength * (kappa_d - 1)], [*w_q, 1 - strength]
    w_d, w_q = (torch.tensor(w, dtype=torch.float64) for w in (w_d, w_q))

    def published(layer, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        y = layer.base_layer(x) + parameter_gate(layer.deployed, x, w_d)
        return y + parameter_gate(layer.quarantine, x, w_q)

    mask = graft_mask(FLAGGED, strength=strength, sizes=sizes, scheme=scheme)
    expected = run(model, published)
    unlike = routed(model, gr.RouteMask.zones(torch.zeros(5, dtype=torch.long)))
    found = routed(model, mask)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    assert_same(found, found, unlike)


def test_graft_at_its_corners() -> None:
    plain = graft_mask(FLAGGED, strength=0.0)
    assert plain.g_d.tolist() == plain.g_q.tolist() == [1.0] * 5
    full = graft_mask(FLAGGED, sizes=(16, 16))
    assert torch.equal(full.g_d, gr.RouteMask.classic(FLAGGED).g_d)
    assert full.g_q.tolist() == [2.0, 1.0, 2.0, 1.0, 1.0]
    exclusive = graft_mask(FLAGGED, sizes=(16, 16), scheme="exclusive")
    assert exclusive.g_d.tolist() == [0.0, 2.0, 0.0, 2.0, 2.0]
    assert exclusive.g_q.tolist() == [2.0, 0.0, 2.0, 0.0, 0.0]
    assert graft_mask(FLAGGED, strength=1.5).g_d[0] == -0.5
    assert all(mask.m.tolist() == [1.0] * 5 for mask in (plain, full, exclusive))


def test_the_kappas_are_capped() -> None:
    assert graft_mask(FLAGGED, sizes=(99, 1)).g_q[0] == 4.0
    assert graft_mask(FLAGGED, sizes=(99, 1), cap=10.0).g_q[0] == 10.0
    assert graft_mask(FLAGGED, sizes=(1, 99), scheme="exclusive", cap=3.0).g_d[1] == 3.0
    assert graft_mask(FLAGGED, sizes=(3, 1), cap=10.0).g_q[0] == 4.0


def test_tokens_can_be_flagged() -> None:
    assert graft_mask(FLAGGED[None], sizes=(1, 1)).g_q.tolist() == [[2.0, 1.0, 2.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"strength": -0.1}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": float("inf")}, "strength"),
        ({"sizes": (0.0, 1.0)}, "sizes"),
        ({"sizes": (1.0, float("inf"))}, "sizes"),
        ({"cap": 0.9}, "cap"),
        ({"cap": float("inf")}, "cap"),
        ({"scheme": "both"}, "scheme"),
    ],
)
def test_settings_out_of_range_raise(settings: dict, argument: str) -> None:
    with pytest.raises(REFUSED, match=argument):
        graft_mask(FLAGGED, **settings)


# SGTM


def test_sgtm_equals_zeroed_gradients_and_zeroed_activations() -> None:
    """Batch by batch as published: retain gradients zeroed on forget data, forget activations zeroed on retain data."""
    model = routed_tower()
    forget, unlabelled = FLAGGED, torch.tensor([False, True, False, False, False])
    expected: dict[str, Tensor] = {}
    for i in range(5):
        model.zero_grad()
        on = 0.0 if not (forget[i] or unlabelled[i]) else 1.0

        def layer_forward(layer, x: Tensor, on: float = on) -> Tensor:  # type: ignore[no-untyped-def]
            return layer.base_layer(x) + branch(layer.deployed, x) + on * branch(layer.quarantine, x)

        hidden = torch.tanh(layer_forward(model.lower, X[i : i + 1]))
        layer_forward(model.upper, hidden).square().sum().backward()
        deployed = {name for name, _ in gr.deployed_parameters(model)}
        for name, gradient in gradients(model).items():
            kept = torch.zeros_like(gradient) if forget[i] and name in deployed else gradient
            expected[name] = expected.get(name, 0) + kept
    found = routed(model, sgtm_mask(forget, unlabelled))
    assert_same(found, expected, routed(model, sgtm_mask(forget)))


def test_sgtm_without_unlabelled_rows_is_the_exclusive_mask() -> None:
    mask, exclusive = sgtm_mask(FLAGGED), gr.RouteMask.exclusive(FLAGGED)
    assert all(torch.equal(getattr(mask, w), getattr(exclusive, w)) for w in ("m", "g_d", "g_q"))


def test_a_row_is_not_both_forget_and_unlabelled() -> None:
    with pytest.raises(gr.GradRouteError, match="`forget` and `unlabelled` should exclude each other"):
        sgtm_mask(FLAGGED, FLAGGED)


# Expand, route, ablate


@pytest.mark.parametrize("rate", [0.0, -0.75])
def test_expand_route_ablate_equals_its_learning_rates(rate: float) -> None:
    """Forget and retain data apart: on forget data the old dimensions' gradient is multiplied by their rate."""
    model = routed_tower()
    expected: dict[str, Tensor] = {}
    deployed = {name for name, _ in gr.deployed_parameters(model)}
    for rows, factor in ((FLAGGED, rate), (~FLAGGED, 1.0)):
        model.zero_grad()
        model(X[rows]).square().sum().backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + (factor if name in deployed else 1.0) * gradient
    found = routed(model, expand_route_ablate_mask(FLAGGED, old_rate=rate))
    assert_same(found, expected, routed(model, gr.RouteMask.zones(torch.ones(5, dtype=torch.long))))


# Detach mix


def test_detach_mix_equals_mixed_detached_activations() -> None:
    model = routed_tower(stop_gradient="branch")
    m_d, m_q = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.5]).double(), torch.tensor([1.0, 0.0, 1.0, 0.25, 1.0]).double()

    def mixed(layer, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        y = layer.base_layer(x)
        for block, m in ((layer.deployed, m_d[:, None]), (layer.quarantine, m_q[:, None])):
            a = branch(block, x)
            y = y + m * a + (1 - m) * a.detach()
        return y

    mask = detach_mix_mask(m_d, m_q)
    expected = run(model, mixed)
    found = routed(model, mask)
    assert_same(found, expected, routed(routed_tower(), mask))


@pytest.mark.corner("`graft_mask(strength=)` with advantages per block", "weighted baselines let it act")
def test_the_strength_of_graft_acts_through_weighted_baselines() -> None:
    """Composed with `clean`, which is zero on flagged rows, every strength would give the same deployed gradient."""
    rewards, flagged = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([True, False, False, False])
    contributions = []
    for strength in (0.0, 0.5, 1.0, 1.5):
        g_d = graft_mask(flagged, strength=strength, sizes=(16, 16)).g_d
        contributions.append(g_d * weighted_baseline_advantages(rewards, g_d, 4))
    clean_baseline = clean_baseline_advantages(rewards, flagged, 4)
    torch.testing.assert_close(contributions[0], clean_baseline.full)
    torch.testing.assert_close(contributions[2], clean_baseline.clean)
    # r - 3/7 with half of the weight; r - 1/3, turned around with half of the weight.
    assert [c[0].item() for c in contributions] == pytest.approx([0.5, 2 / 7, 0.0, -1 / 3])


@pytest.mark.parametrize("make", [graft_mask, sgtm_mask, expand_route_ablate_mask])
def test_flags_must_be_boolean(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(REFUSED, match=r"[Ff]lag|forget"):
        make(torch.tensor([1, 0]))

"""`quarantine_lora`: values, derivatives, gates."""

import pytest
import torch
from torch import Tensor

import gradroute as gr
from gradroute._protocol import Block

pytestmark = pytest.mark.touches_peft

N, D_IN, D_OUT, R, R_Q = 6, 5, 4, 2, 3
M = torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0, 0.0], dtype=torch.float64)
G_D = torch.tensor([1.0, 1.0, 0.0, -0.7, 2.5, 0.0], dtype=torch.float64)
G_Q = torch.tensor([0.0, 1.0, 1.0, 0.3, -1.5, 1.0], dtype=torch.float64)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (N, D_IN), "base": (N, D_OUT), "A_d": (R, D_IN), "B_d": (D_OUT, R), "A_q": (R_Q, D_IN), "B_q": (D_OUT, R_Q)
    }  # fmt: skip
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def run(x: Tensor, base: Tensor, A_d: Tensor, B_d: Tensor, A_q: Tensor, B_q: Tensor, **gates: object) -> Tensor:
    return gr.adapters.quarantine_lora(x, base, Block(A_d, B_d, 1.5), Block(A_q, B_q, 0.75), **gates)


def test_output_is_the_formula() -> None:
    t = tensors()
    expected = (
        t["base"] + 1.5 * t["x"] @ t["A_d"].T @ t["B_d"].T + M[:, None] * 0.75 * (t["x"] @ t["A_q"].T @ t["B_q"].T)
    )
    torch.testing.assert_close(run(**t, m=M), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(**t), expected)


def test_true_derivative_by_gradcheck_with_a_soft_mask() -> None:
    t = tensors()
    assert torch.autograd.gradcheck(lambda *args: run(*args, m=M), tuple(t.values()))


def test_dx_does_not_see_the_gates_but_sees_the_mask() -> None:
    t = tensors()
    upstream = torch.randn(N, D_OUT, dtype=torch.float64)
    (ungated,) = torch.autograd.grad(run(**t, m=M), t["x"], upstream)
    (gated,) = torch.autograd.grad(run(**t, m=M, g_d=G_D, g_q=G_Q), t["x"], upstream)
    (unmasked,) = torch.autograd.grad(run(**t), t["x"], upstream)
    assert torch.equal(gated, ungated)
    assert not torch.allclose(unmasked, ungated)


def test_branch_detaching_cuts_dx() -> None:
    t = tensors()
    upstream = torch.randn(N, D_OUT, dtype=torch.float64)
    (dx,) = torch.autograd.grad(run(**t, m=M, g_d=G_D, g_q=G_Q, stop_gradient="branch"), t["x"], upstream)
    deployed = 1.5 * upstream @ t["B_d"] @ t["A_d"]
    quarantine = 0.75 * upstream @ t["B_q"] @ t["A_q"]
    expected = G_D[:, None] * deployed + (G_Q * M)[:, None] * quarantine
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)
    (true,) = torch.autograd.grad(run(**t, m=M, g_d=G_D, g_q=G_Q), t["x"], upstream)
    assert not torch.allclose(dx, true)


def test_parameter_gradients_are_weighted_sums_over_rows() -> None:
    t = tensors()
    names = ["A_d", "B_d", "A_q", "B_q"]
    upstream = torch.randn(N, D_OUT, dtype=torch.float64)
    routed = torch.autograd.grad(run(**t, m=M, g_d=G_D, g_q=G_Q), [t[n] for n in names], upstream)
    for name, gradient in zip(names, routed, strict=True):
        expected = torch.zeros_like(gradient)
        for i in range(N):
            one = torch.zeros(N, dtype=torch.float64)
            one[i] = 1.0
            (row,) = torch.autograd.grad(run(**t, m=M), t[name], upstream * one[:, None])
            expected += (G_D if name.endswith("d") else G_Q)[i] * row
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_all_ones_is_no_mask() -> None:
    t = tensors()
    ones = torch.ones(N, dtype=torch.float64)
    masked, plain = run(**t, m=ones, g_d=ones, g_q=ones), run(**t)
    assert torch.equal(masked, plain)
    for name in t:
        (a,) = torch.autograd.grad(masked.sum(), t[name], retain_graph=True)
        (b,) = torch.autograd.grad(plain.sum(), t[name], retain_graph=True)
        assert torch.equal(a, b)


def test_non_finite_bottleneck_of_a_masked_row_contributes_nothing() -> None:
    t = tensors()
    with torch.no_grad():
        t["A_q"][:, 0] = 1e308
        t["x"][:, 0] = 0.0
        t["x"][0, 0] = 1e10  # u_q overflows in row 0 alone, whose m is 0
    assert M[0] == 0
    assert not torch.isfinite(t["x"][0] @ t["A_q"].T).any()
    masked, unmasked = run(**t, m=M, g_q=G_Q), run(**t)
    assert torch.isfinite(masked).all()
    assert not torch.isfinite(unmasked[0]).any()
    (dB,) = torch.autograd.grad(masked.sum(), t["B_q"])
    (dB_unmasked,) = torch.autograd.grad(unmasked.sum(), t["B_q"])
    assert torch.isfinite(dB).all()
    assert not torch.isfinite(dB_unmasked).any()


def test_non_finite_bottleneck_gradient_of_a_gated_row_contributes_nothing() -> None:
    t = tensors()
    g_d = torch.ones(N, dtype=torch.float64)
    g_d[0] = 0.0
    upstream = torch.ones(N, D_OUT, dtype=torch.float64)
    with torch.no_grad():
        t["B_d"].mul_(1e10)
        upstream[0] = 1e300  # dz = B^T dy overflows in row 0 alone
    assert not torch.isfinite(upstream[0] @ t["B_d"]).all()
    (gated,) = torch.autograd.grad(run(**t, g_d=g_d), t["A_d"], upstream)
    (ungated,) = torch.autograd.grad(run(**t), t["A_d"], upstream)
    assert torch.isfinite(gated).all()
    assert not torch.isfinite(ungated).all()


def test_a_row_that_nobody_needs_still_gives_zero_gradients_not_none() -> None:
    t = tensors()
    zero = torch.zeros(N, dtype=torch.float64)
    run(**t, m=zero, g_d=zero, g_q=zero).sum().backward()
    for name in ("A_d", "B_d", "A_q", "B_q"):
        assert t[name].grad is not None
        assert torch.equal(t[name].grad, torch.zeros_like(t[name]))


def test_double_backward_raises() -> None:
    t = tensors()
    with pytest.raises(gr.errors.RouteError, match="double backward"):
        torch.autograd.grad(run(**t).pow(2).sum(), t["x"], create_graph=True)


def test_unknown_stop_gradient_raises() -> None:
    with pytest.raises(Exception, match="stop_gradient"):
        run(**tensors(), stop_gradient="output")


@pytest.mark.parametrize(
    "gate", [torch.ones(N - 1), torch.ones(1), torch.ones(N, dtype=torch.long), torch.ones(N, requires_grad=True)]
)
def test_gates_that_do_not_fit_raise(gate: Tensor) -> None:
    with pytest.raises((gr.errors.RouteError, TypeError)):
        run(**tensors(), g_d=gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_close_to_float64_and_advantages_are_not_rounded(dtype: torch.dtype) -> None:
    t = tensors()
    advantages = torch.full((N,), 1.0 + 1 / 300)  # bf16 would round this to 1
    low = {name: value.detach().to(dtype).requires_grad_() for name, value in t.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in low.items()}
    for g in (advantages, torch.ones(N)):
        (rounded,) = torch.autograd.grad(run(**low, g_d=g).sum(), low["A_d"])
        (reference,) = torch.autograd.grad(run(**exact, g_d=g.double()).sum(), exact["A_d"])
        torch.testing.assert_close(rounded.double(), reference, rtol=0.03, atol=0.05)


def test_autocast_runs_in_the_autocast_type_and_returns_gradients_in_the_parameters_type() -> None:
    t = {name: value.detach().float().requires_grad_() for name, value in tensors().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(t["x"], t["base"].bfloat16(), *list(t.values())[2:], m=M.float())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert t["A_q"].grad.dtype == torch.float32
    reference = run(**{n: v.detach().double() for n, v in t.items()}, m=M)
    torch.testing.assert_close(output.double(), reference, rtol=0.05, atol=0.1)

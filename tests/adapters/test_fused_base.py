"""The layer computes W x itself and accumulates into it where nobody would notice, and else calls its base layer."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from support.models import gradients, randomize_blocks
from support.tiny_models import config
from torch import Tensor, nn

import gradroute as gr
from gradroute.adapters._products import frozen_linear

X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK = gr.RouteMask.weights(m=[0.5, 1.0], g_d=[1.0, -0.5], g_q=[2.0, 0.0])


def routed(bias: bool = True, adapters: str = "attach", **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=bias)).double()
    if adapters == "attach":
        return randomize_blocks(gr.attach(model, r=2, r_quarantine=3, lora_alpha=4.0))
    options = {"target_modules": ["0"], **options}
    return randomize_blocks(get_peft_model(model, config(**options), autocast_adapter_dtype=False)).base_model.model


def base_of(model: nn.Sequential) -> nn.Module:
    return model[0].base_layer


def step(model: nn.Module, x: Tensor = X) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients of the blocks, gradient to the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with gr.route(model, MASK):
        y = model(x)
        y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), gradients(model), x.grad


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def watch_forward(base: nn.Module, seen: list[str]) -> None:
    base.register_forward_hook(lambda *_: seen.append("hook"))


def watch_input(base: nn.Module, seen: list[str]) -> None:
    base.register_forward_pre_hook(lambda *_: seen.append("hook"))


def watch_backward(base: nn.Module, seen: list[str]) -> None:
    base.register_full_backward_hook(lambda *_: seen.append("hook"))


def own_forward(base: nn.Module, seen: list[str]) -> None:
    plain = base.forward

    def forward(x: Tensor) -> Tensor:
        seen.append("forward")
        return plain(x)

    base.forward = forward


@pytest.mark.parametrize("watch", [watch_forward, watch_input, watch_backward, own_forward])
@pytest.mark.parametrize("adapters", ["attach", "PEFT"])
def test_what_watches_the_base_layer_is_called_and_nothing_changes(
    watch: Callable[[nn.Module, list[str]], None], adapters: str
) -> None:
    model, seen = routed(adapters=adapters), []
    assert frozen_linear(base_of(model), X) is not None
    expected = step(model)
    watch(base_of(model), seen)
    assert frozen_linear(base_of(model), X) is None
    assert_same(step(model), expected)
    assert len(seen) == 1
    with torch.no_grad(), gr.ablate_quarantine(model):
        model(X)
    assert len(seen) == (1 if watch is watch_backward else 2)


def test_a_hook_on_all_modules_sees_the_base_layer() -> None:
    model, seen = routed(), []
    expected = step(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert_same(step(model), expected)
    finally:
        handle.remove()
    assert base_of(model) in seen


def test_an_output_kept_by_a_hook_on_the_base_layer_is_not_written_to() -> None:
    model, kept = routed(), []
    base_of(model).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(X)
        torch.testing.assert_close(kept[0], nn.functional.linear(X, base_of(model).weight, base_of(model).bias))


def test_a_base_weight_that_is_trained_gets_its_gradient() -> None:
    model = routed()
    expected = step(model)
    base_of(model).weight.requires_grad_()
    y, found, dx = step(model)
    assert found.pop("0.base_layer.weight").any()
    assert_same((y, found, dx), expected)
    with gr.route(model, MASK):
        dy = 2 * model(X).detach()
    torch.testing.assert_close(base_of(model).weight.grad, torch.einsum("bto,bti->oi", dy, X))


def test_another_kind_of_base_layer_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = routed()
    with torch.no_grad():
        single = model(X)
        base_of(model).__class__ = Doubled
        torch.testing.assert_close(model(X) - single, base_of(model)(X) / 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [X, X[0], X.transpose(0, 1), X[:, :0], X[..., :1].expand(-1, -1, 6)],
                         ids=["3d", "2d", "strided", "empty", "expanded"])  # fmt: skip
def test_every_layout_of_the_input_gives_the_formula(bias: bool, x: Tensor) -> None:
    model = routed(bias)
    layer = model[0]
    (A, B, s), (A_q, B_q, s_q) = layer.deployed, layer.quarantine
    expected = layer.base_layer(x) + s * x @ A.T @ B.T + s_q * x @ A_q.T @ B_q.T
    assert x.numel() == 0 or not torch.allclose(expected, layer.base_layer(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_can_be_changed_in_place(bias: bool) -> None:
    model = routed(bias)
    outputs = []
    for change in (lambda y: y.mul(2), lambda y: y.mul_(2)):
        model.zero_grad()
        change(model(X)).square().sum().backward()
        outputs.append(gradients(model))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)


def test_one_dropout_serves_both_blocks_and_not_the_base() -> None:
    model = routed(adapters="PEFT", lora_dropout=0.5).train()
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(X, 0.5)
    (A, B, s), (A_q, B_q, s_q) = model[0].deployed, model[0].quarantine
    expected = base_of(model)(X) + s * dropped @ A.T @ B.T + s_q * dropped @ A_q.T @ B_q.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y.sum(), x)
    through = (s * B @ A + s_q * B_q @ A_q).sum(0) * (dropped / X)
    torch.testing.assert_close(dx, base_of(model).weight.sum(0) + through, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scalings", [(0.0, 2.0), (2.0, 0.0), (1.5, 0.5)])
@pytest.mark.parametrize("rows", [3, 20])
def test_unequal_and_zero_scalings_have_true_derivatives(scalings: tuple[float, float], rows: int) -> None:
    shapes = ((rows, 4), (2, 4), (3, 2), (2, 4), (3, 2))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x: Tensor, A: Tensor, B: Tensor, A_q: Tensor, B_q: Tensor) -> Tensor:
        blocks = gr._protocol.Block(A, B, scalings[0]), gr._protocol.Block(A_q, B_q, scalings[1])
        return gr.adapters.quarantine_lora(x, torch.zeros(rows, 3, dtype=torch.float64), *blocks)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_blocks_of_another_type_than_the_base_are_added_in_the_wider_one(types: tuple[torch.dtype, ...]) -> None:
    exact, model = routed(), routed()
    layer = model[0].to(types[1])
    layer.base_layer.to(types[0])
    expected = exact(X)
    found = model(X.to(types[0]))
    assert found.dtype == types[0]
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.1)
    assert not torch.allclose(base_of(exact)(X), expected, rtol=0.02, atol=0.1)


def test_autocast_around_backward_alone_changes_nothing() -> None:
    model = routed().float()
    x = X.float()
    results = []
    for autocast in (False, True):
        model.zero_grad()
        loss = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[1], results[0])


def test_a_frozen_ablated_quarantine_is_left_out_and_a_trained_one_is_not() -> None:
    model = routed()
    deployed = [p for _, p in gr.deployed_parameters(model)]
    with gr.ablate_quarantine(model):
        model(X).square().sum().backward()
        expected = [p.grad.clone() for p in deployed]
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for _, p in gr.quarantine_parameters(model))
        model.zero_grad()
        for _, p in gr.quarantine_parameters(model):
            p.requires_grad_(False)
        model(X).square().sum().backward()
    torch.testing.assert_close([p.grad for p in deployed], expected, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for _, p in gr.quarantine_parameters(model))

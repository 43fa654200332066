"""A route or view belongs to the thread that opened it, and to threads started inside that do not train."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import gradients, routed_tower
from torch import Tensor, nn

import gradroute as gr

pytestmark = pytest.mark.touches_peft

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = gr.RouteMask.zones(["keep", "absorb", "route", "keep"])


class Worker:
    """A thread that runs what it is given, one call after the other."""

    def __init__(self) -> None:
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            self.asked.acquire()
            if self.work is None:
                return
            try:
                self.result: Any = self.work()
            except Exception as error:
                self.result = error
            self.done.release()

    def __call__(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, or what it raised, raised here."""
        self.work: Callable[[], Any] | None = work
        self.asked.release()
        self.done.acquire()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.work = None
        self.asked.release()
        self.thread.join()


def ablated(model: nn.Module) -> Tensor:
    with gr.ablate_quarantine(model):
        return model(X)


@pytest.mark.corner("another thread runs the model during an ablation", "`RouteError`")
def test_a_thread_that_was_there_before_does_not_run_in_the_view_of_another() -> None:
    model = routed_tower()
    with Worker() as other, torch.no_grad(), gr.ablate_quarantine(model):
        with pytest.raises(gr.errors.RouteError, match="thread that opened its route"):
            # Gradients are on or off for each thread.
            other(torch.no_grad()(lambda: model(X)))
        model(X)


def test_a_training_forward_of_another_thread_raises_instead_of_changing_its_gradient() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model):
        with Worker() as started_inside, pytest.raises(gr.errors.RouteError, match="thread that opened its route"):
            started_inside(lambda: model(X).sum().backward())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("block", [gr.ablate_quarantine, gr.disable_adapters, lambda model: gr.route(model, MASK)])
def test_a_second_thread_opens_nothing_while_the_first_has_a_block_open(block: Callable[[nn.Module], Any]) -> None:
    model, plain = routed_tower(), routed_tower()
    with Worker() as other, gr.route(model, MASK):
        loss = model(X).sum()
        with pytest.raises(gr.errors.RouteError, match="One thread at a time.*another thread at `lower`"):
            other(lambda: block(model).__enter__())
        loss.backward()
    with gr.route(plain, MASK):
        plain(X).sum().backward()
    expected = gradients(plain)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
    assert model.lower.view == "on"


@pytest.mark.corner("an engine generates in a thread started inside an ablation", "it shows the ablated view")
def test_a_thread_that_is_started_inside_works_for_the_view() -> None:
    model = routed_tower()
    with torch.no_grad():
        expected = ablated(model)
        with gr.ablate_quarantine(model), Worker() as engine:
            # Gradients are on or off for each thread.
            assert torch.equal(engine(torch.no_grad()(lambda: model(X))), expected)


def test_threads_take_turns() -> None:
    model = routed_tower()
    expected = ablated(model)
    with Worker() as other:
        assert torch.equal(other(lambda: ablated(model)), expected)
        gr.adapters.set_route(model, MASK)
        model(X)
        gr.adapters.clear_route(model)
        assert torch.equal(other(lambda: ablated(model)), expected)
        assert torch.equal(ablated(model), expected)


def test_backward_in_another_thread_is_exact() -> None:
    # On an accelerator autograd has threads for it; a recomputation runs in them.
    model, plain = routed_tower(), routed_tower()
    with gr.route(plain, MASK):
        plain(X).sum().backward()
    expected = gradients(plain)
    for checkpointed in (False, True):
        model.zero_grad()
        with gr.route(model, MASK), Worker() as other:
            x = X.clone().requires_grad_()
            run = torch.utils.checkpoint.checkpoint if checkpointed else lambda f, x, **_: f(x)
            loss = run(model, x, use_reentrant=False).sum()
            other(loss.backward)
        assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())

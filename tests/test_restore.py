"""`left_as_found`: what a measurement touches is put back, also after an exception."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.language_models import Mixer, routed_mixer

from gradroute._restore import left_as_found

IDS = torch.tensor([[1, 2, 3]])


def disturb(model: Mixer) -> None:
    model.requires_grad_(True)
    model(IDS).sum().backward()
    model.train()
    torch.rand(3)
    random.random()
    np.random.random()


@pytest.fixture(params=[False, True], ids=["returns", "raises"])
def disturbed(request: pytest.FixtureRequest):
    """A function that disturbs a model inside `left_as_found`, with and without an exception."""

    def run(model: Mixer) -> None:
        with pytest.raises(KeyboardInterrupt) if request.param else nullcontext():
            with left_as_found(model):
                disturb(model)
                if request.param:
                    raise KeyboardInterrupt

    return run


def test_the_model_is_in_eval_mode_without_gradients_inside() -> None:
    model = routed_mixer().train()
    model(IDS).sum().backward()
    with left_as_found(model):
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_each_modules_mode_is_put_back(disturbed) -> None:
    model = routed_mixer().train()
    model.q.eval()
    modes = [module.training for module in model.modules()]
    disturbed(model)
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}


def test_each_gradient_is_the_same_tensor_bitwise(disturbed) -> None:
    model = routed_mixer()
    model(IDS).sum().backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    disturbed(model)
    for parameter, (grad, copy) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, copy)
    assert {grad is None for grad, _ in before} == {True, False}


def test_requires_grad_is_put_back(disturbed) -> None:
    model = routed_mixer()
    before = [p.requires_grad for p in model.parameters()]
    disturbed(model)
    assert [p.requires_grad for p in model.parameters()] == before
    assert set(before) == {True, False}


def test_random_numbers_go_on_as_before(disturbed) -> None:
    model = routed_mixer()

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    seed()
    expected = torch.rand(2), random.random(), np.random.random()
    seed()
    disturbed(model)
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.random()) == expected[1:]


def test_use_cache_is_put_back() -> None:
    model = routed_mixer()
    model.config = SimpleNamespace(use_cache=True)
    with pytest.raises(KeyboardInterrupt), left_as_found(model):
        model.config.use_cache = False
        raise KeyboardInterrupt
    assert model.config.use_cache is True


def test_it_nests(disturbed) -> None:
    model = routed_mixer().train()
    with left_as_found(model):
        disturbed(model)
        assert not model.training
    assert model.training

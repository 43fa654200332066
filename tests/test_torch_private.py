"""What the library reads from private names of torch, and what each must show in every version."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradroute import _torch_private as private


class Seen(nn.Module):
    """Notes what a function says in each forward: the first, and the recomputation."""

    def __init__(self, look: object) -> None:
        super().__init__()
        self.look, self.seen = look, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.look())
        return x.sin()


def seen(look: object, use_reentrant: bool, *, grad: bool = True) -> list[object]:
    module, x = Seen(look), torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(grad):
        y = checkpoint(module, x, use_reentrant=use_reentrant)
    if grad:
        y.sum().backward()
    return module.seen


both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


@both_modes
def test_a_recomputation_is_in_backward(use_reentrant: bool) -> None:
    assert seen(private.in_backward, use_reentrant) == [False, True]
    first, second = seen(private.backward_task, use_reentrant)
    assert first == -1 != second


def test_each_backward_has_another_number() -> None:
    assert len({seen(private.backward_task, False)[1] for _ in range(3)}) == 3


def test_only_a_reentrant_checkpoint_is_in_the_forward_of_a_function() -> None:
    assert seen(private.in_function_forward, True)[0]
    assert not seen(private.in_function_forward, False)[0]
    with torch.no_grad():
        assert not private.in_function_forward()


def test_a_reentrant_checkpoint_is_found_in_its_forward_and_in_its_recomputation() -> None:
    (running, none), (others, recomputed) = seen(private.reentrant_checkpoints, True)
    assert len(running) == 1
    assert none is None
    assert others == []
    assert recomputed is running[0]
    assert seen(private.reentrant_checkpoints, False) == [([], None), ([], None)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("grad", [True, False])
def test_a_function_knows_in_its_forward_whether_it_will_have_a_backward(grad: bool) -> None:
    def look() -> list[bool]:
        return [private.will_have_backward(context) for context in private.reentrant_checkpoints()[0]]

    assert seen(look, True, grad=grad)[0] == [grad]


def test_a_checkpoint_that_is_not_reentrant_is_found_in_its_forward_and_in_its_recomputation() -> None:
    (frame, none), (_, recomputed) = seen(private.non_reentrant_checkpoint, False)
    assert frame is not None
    assert none is None
    assert recomputed is frame
    assert private.non_reentrant_checkpoint() == (None, None)
    with torch.autograd.graph.save_on_cpu():
        assert private.non_reentrant_checkpoint() == (None, None)


def test_a_forward_that_does_more_than_its_class_says_is_watched() -> None:
    linear = nn.Linear(2, 2)
    assert not private.forward_is_watched(linear)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(linear, f"register_{register}")(lambda *_: None)
        assert private.forward_is_watched(linear)
        handle.remove()
        handle = getattr(nn.modules.module, f"register_module_{register}")(lambda *_: None)
        assert private.forward_is_watched(linear)
        handle.remove()
    assert not private.forward_is_watched(linear)
    linear.forward = linear.forward
    assert private.forward_is_watched(linear)
    other = nn.Linear(2, 2)
    other.compile(backend="eager")
    assert private.forward_is_watched(other)


def test_a_reshaped_tensor_can_be_written_to_in_the_output_of_a_function() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return private.unsafe_view((2 * x).reshape(-1), x.shape)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return 2 * dy

    x = torch.ones(2, 3, requires_grad=True)
    y = Doubled.apply(x)
    y.add_(1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


def test_a_call_after_backward_sees_all_gradients_and_comes_behind_what_the_backward_has_queued() -> None:
    x, order = torch.ones(2, requires_grad=True), []
    last = torch.ones(2, requires_grad=True)

    def accumulated(_: Tensor) -> None:
        # As DDP does: at the end of this backward.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("queued"))

    x.register_post_accumulate_grad_hook(
        lambda _: private.call_after_backward(lambda: order.append(x.grad is not None and last.grad is not None))
    )
    last.register_post_accumulate_grad_hook(accumulated)
    (x * last).sum().backward()
    assert order == ["queued", True]


def test_a_scaler_knows_whether_gradients_still_have_its_scale() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    assert not private.is_still_scaled(None, optimizer)
    assert not private.is_still_scaled(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    scaler.scale(parameter.sum()).backward()
    assert private.is_still_scaled(scaler, optimizer)
    scaler.unscale_(optimizer)
    assert not private.is_still_scaled(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert private.is_still_scaled(scaler, optimizer)


@pytest.mark.distributed
def test_the_store_by_which_processes_found_each_other(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = private.default_store()
        assert (store.add("gradroute test", 2), store.add("gradroute test", 3)) == (2, 5)
        store.set("gradroute said", "yes")
        store.wait(["gradroute said"], timedelta(seconds=1))
        assert store.get("gradroute said") == b"yes"
        with pytest.raises(RuntimeError):
            store.wait(["gradroute not said"], timedelta(milliseconds=10))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_a_whole_parameter_that_fsdp_left_in_its_place_is_known(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, model = nn.Linear(2, 2), nn.Linear(2, 2)
    before = len(private.fsdp_groups())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model)
        assert len(private.fsdp_groups()) == before + 1
        shard = model.weight
        with torch.no_grad():
            model(torch.ones(1, 2))
        assert model.weight is not shard
        assert {id(model.weight), id(model.bias)} <= private.gathered_by_fsdp()
        assert {id(shard), id(plain.weight)}.isdisjoint(private.gathered_by_fsdp())
    finally:
        torch.distributed.destroy_process_group()

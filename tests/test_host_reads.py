"""On a GPU, what the host reads or uploads in a step does not grow with the layers: each read waits for the device."""

import pytest
import torch
from support.emulated_gpu import EmulatedGpu, emulated_gpu
from support.step_paths import PAIRS, STEPS, stack
from torch import Tensor

import gradroute as gr
from gradroute._transfers import moved_together, read_together


def transfers_of(path: str, depth: int) -> EmulatedGpu:
    """Of a step, after a first one that may fill caches."""
    model = stack(depth)
    with emulated_gpu() as gpu:
        step = STEPS[path](model)
        step()
        gpu.forget()
        step()
    return gpu


QUICK = {
    "routed forward and backward", "route() enter and exit", "capture_activations, pool a function",
    "capture_gradients and score, inner products", "BandGate", "QuantileGate after a refresh",
    "Refresher.step, not due", "ProjectionFilter and apply_filter", "RolloutFilter and apply_filter",
    "skip_idle_blocks, a block idle", "project_updates", "block norms",
}  # fmt: skip


@pytest.mark.parametrize("path", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in STEPS])
def test_the_host_reads_and_uploads_as_often_in_a_deep_model_as_in_a_shallow_one(path: str) -> None:
    shallow, deep = transfers_of(path, 2), transfers_of(path, 5)
    assert deep.reads == shallow.reads
    assert deep.uploads == shallow.uploads


def counted(run: object) -> EmulatedGpu:
    with emulated_gpu() as gpu:
        run()
    return gpu


x = torch.arange(6.0)


@pytest.mark.parametrize(
    "read",
    [
        x.sum().item, lambda: float(x[0]), lambda: int(x[0]), lambda: bool(x.any()), x.tolist, x.cpu,
        lambda: x.to("cpu"), lambda: x.to(torch.device("cpu"), torch.float64), x.numpy, x.nonzero,
        lambda: x[x > 1], lambda: torch.equal(x, x + 1), lambda: f"{x[0]:.2f}",
        lambda: torch.zeros(6).copy_(x), lambda: [value for value in x[:1] if value == 0],
    ],
)  # fmt: skip
def test_the_counter_sees_each_kind_of_read_once(read: object) -> None:
    assert sum(counted(read).reads.values()) == 1


def test_the_counter_leaves_alone_what_reads_nothing_of_the_device() -> None:
    def nothing() -> None:
        host = torch.ones(3)
        assert host.sum().item() == 3
        assert x.device.type == "cuda"
        assert x.is_cuda and not host.is_cuda  # noqa: PT018
        x[x > 7] = 0.0
        torch.where(x > 1, x, 0.0)
        read = x.cpu()
        assert read.tolist() == list(range(6))

    assert sum(counted(nothing).reads.values()) == 1


def test_the_counter_sees_reads_in_hooks_and_functions_of_a_backward() -> None:
    def backward() -> None:
        leaf = torch.ones(3, device="cuda").requires_grad_()
        y = leaf * 2
        y.register_hook(lambda g: g * g.sum().item())
        y.sum().backward()

    assert sum(counted(backward).reads.values()) == 1


def test_the_counter_sees_uploads_and_refuses_tensors_of_both_sides_in_one_operation() -> None:
    with emulated_gpu() as gpu:
        host = torch.ones(6)
        assert torch.equal(host.to(x.device) + x, x + 1)
        torch.tensor([1.0], device="cuda")
        assert sum(gpu.uploads.values()) == 2
        with pytest.raises(RuntimeError, match="on the CPU"):
            x + host
        assert (x + torch.tensor(1.0)).is_cuda  # as in torch, a number without axes is taken from the host


def test_values_read_together_are_those_read_one_by_one() -> None:
    values = [torch.tensor(3), torch.tensor(True), torch.tensor(2**40 + 1), torch.tensor(False)]
    assert read_together(values) == [value.item() for value in values]
    values = [torch.tensor(0.1), torch.tensor([[0.2]], dtype=torch.float64), torch.tensor(0.3, dtype=torch.bfloat16)]
    assert read_together(values) == [value.item() for value in values]
    assert read_together([]) == []


@pytest.mark.parametrize("limit", [1, 24, 2**20])
def test_tensors_moved_together_are_those_moved_one_by_one(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradroute._transfers._JOINED_BYTES", limit)
    tensors = [torch.randn(2, 3), torch.randn(4), torch.arange(5), torch.zeros(0, 3), torch.randn(2).double()]
    with emulated_gpu() as gpu:
        moved = moved_together(tensors, torch.device("cpu"))
        assert all(gpu.on_host(each) for each in moved)
        reads = sum(gpu.reads.values())
        assert all(same(mine, given) for mine, given in zip(moved, tensors, strict=True))
    assert reads == {1: 5, 24: 4, 2**20: 3}[limit]
    assert all(mine is given for mine, given in zip(moved_together(tensors, tensors[0].device), tensors, strict=True))


def same(mine: Tensor, given: Tensor) -> bool:
    return mine.dtype == given.dtype and mine.tolist() == given.tolist()


def test_directions_on_the_host_are_uploaded_once_per_version_and_again_where_they_changed() -> None:
    model = stack(3)
    with emulated_gpu() as gpu:
        directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
        assert all(gpu.on_host(rows) for rows in directions.rows.values())

        def score() -> Tensor:
            features = {name: torch.ones(2, rows.shape[1], device="cuda") for name, rows in directions.rows.items()}
            gpu.forget()
            return directions.score(features)

        first = score()
        assert sum(gpu.uploads.values()) == 1
        assert torch.equal(score(), first)
        assert not gpu.uploads
        for rows in directions.rows.values():
            rows.neg_()
        assert torch.equal(score(), -first)  # written to
        assert sum(gpu.uploads.values()) == 1
        directions.rows = {name: -rows for name, rows in directions.rows.items()}
        assert torch.equal(score(), first)  # replaced
        assert sum(gpu.uploads.values()) == 1
        directions.update_(gr.extract_gradient_directions(model, PAIRS, features="parameter"), step=1)
        score()
        assert sum(gpu.uploads.values()) == 1

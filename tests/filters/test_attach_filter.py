"""`attach_filter`: once per optimizer step, on the gradient that backward left, or the step is not taken."""

import accelerate
import pytest
import torch
from support.gradient_directions import deployed_rows, directions_of, drawn_directions
from support.models import routed_tower
from support.tiny_models import peft_model, token_ids
from torch import Tensor, nn

import gradroute as gr
from gradroute.errors import GradRouteError
from gradroute.filters import apply_filter, attach_filter
from gradroute.filters.projection import ProjectionFilter
from gradroute.filters.rollout import RolloutFilter

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: nn.Module) -> Tensor:
    return model(X.to(next(model.parameters()).dtype)).square().sum()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr)


def erasing(model: nn.Module, seed: int = 0) -> ProjectionFilter:
    return ProjectionFilter(drawn_directions(model, 2, seed), mode="erase", side="two")


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in trained(model)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attached_and_applied_by_hand_take_the_same_steps() -> None:
    by_hand, attached, without = routed_tower(), routed_tower(), routed_tower()
    f = erasing(by_hand)
    optimizers = [torch.optim.AdamW(trained(model), lr=0.05) for model in (by_hand, attached, without)]
    handle = attach_filter(optimizers[1], erasing(attached), model=attached)
    for step in range(4):
        for model, optimizer in zip((by_hand, attached, without), optimizers, strict=True):
            optimizer.zero_grad()
            # Two micro-batches, one step.
            loss(model).backward()
            (0.3 * loss(model)).backward()
            if model is by_hand:
                stats = apply_filter(model, f)
            optimizer.step()
        assert handle.steps == step + 1
        assert handle.stats == stats
        assert stats.cout < 1e-12 < stats.cin
    assert same(values(by_hand), values(attached))
    assert not same(values(by_hand), values(without))
    assert repr(handle).endswith(", 4 steps)")


def test_removing_the_handle_ends_it() -> None:
    model, plain = routed_tower(), routed_tower()
    optimizer, other = sgd(model), sgd(plain)
    f = erasing(model)
    handle = attach_filter(optimizer, f, model=model)
    handle.close()
    for m, o in ((model, optimizer), (plain, other)):
        loss(m).backward()
        o.step()
    assert same(values(model), values(plain))
    assert repr(handle).endswith("closed after 0 steps)")
    assert not any(p._post_accumulate_grad_hooks for p in trained(model) if p._post_accumulate_grad_hooks is not None)
    with pytest.raises(GradRouteError, match="has taken no step"):
        handle.stats  # noqa: B018
    # Both the optimizer and the filter are free again.
    attach_filter(optimizer, f, model=model)


def test_peft_models_are_filtered_at_each_step() -> None:
    model = peft_model("llama", torch.float64)
    optimizer = sgd(model)
    handle = attach_filter(optimizer, erasing(model), model=model)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert handle.stats.cout < 1e-12 < 1e-3 < handle.stats.cin


# A step in which the filter cannot run


def refused_step(model: nn.Module, optimizer: torch.optim.Optimizer, message: str) -> None:
    before = values(model)
    with pytest.raises(GradRouteError, match=message):
        optimizer.step()
    assert same(values(model), before)


def test_a_step_without_gradients_raises_and_is_not_taken() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    handle = attach_filter(optimizer, erasing(model), model=model)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    refused_step(model, optimizer, "is None")
    assert handle.steps == 1


@pytest.mark.parametrize("allow_clipped", [True, False])
def test_a_second_step_on_one_gradient_raises(allow_clipped: bool) -> None:
    model = routed_tower()
    optimizer = sgd(model)
    attach_filter(optimizer, erasing(model), model=model, allow_clipped=allow_clipped)
    loss(model).backward()
    optimizer.step()
    refused_step(model, optimizer, "changed since the backward|filtered by this filter already")


def test_applying_by_hand_as_well_raises() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    f = erasing(model)
    attach_filter(optimizer, f, model=model, allow_clipped=True)
    loss(model).backward()
    apply_filter(model, f)
    refused_step(model, optimizer, "use attach_filter, not both")


def test_a_closure_is_refused_because_its_gradients_come_after_the_filter() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    attach_filter(optimizer, erasing(model), model=model)
    loss(model).backward()
    for step in (lambda: optimizer.step(lambda: 1.0), lambda: optimizer.step(closure=lambda: 1.0)):
        with pytest.raises(GradRouteError, match=r"optimizer\.step\(closure\)"):
            step()
    optimizer.step(None)


@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_clipped_gradients_are_refused_unless_allowed(max_norm: float) -> None:
    model = routed_tower()
    optimizer = sgd(model)
    handle = attach_filter(optimizer, erasing(model), model=model)
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(trained(model), max_norm)
    refused_step(model, optimizer, "changed since the backward.*allow_clipped=True")
    handle.close()
    handle = attach_filter(optimizer, erasing(model), model=model, allow_clipped=True)
    before = deployed_rows(model)
    optimizer.step()
    for name, g in deployed_rows(model).items():
        V = handle.filter.directions.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-9)


def test_gradients_of_a_backward_before_the_attachment_cannot_be_known_to_be_unclipped() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    loss(model).backward()
    attach_filter(optimizer, erasing(model), model=model)
    refused_step(model, optimizer, "attach before backward")
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def test_a_rollout_filter_accepts_no_clipped_gradient() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    f = RolloutFilter(drawn_directions(model))
    attach_filter(optimizer, f, model=model, allow_clipped=True)
    with f.record(model):
        loss(model).backward()
    torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
    refused_step(model, optimizer, "written to since its rollouts were recorded")
    model.zero_grad()
    loss(model).backward()
    refused_step(model, optimizer, "written to since|recorded")
    optimizer.zero_grad()
    with f.record(model):
        loss(model).backward()
    optimizer.step()


def test_a_parameter_that_the_optimizer_lost_is_found_at_the_step() -> None:
    model = routed_tower()
    optimizer = sgd(model)
    attach_filter(optimizer, erasing(model), model=model)
    model.upper.lora_A = nn.Parameter(model.upper.lora_A.detach().clone())
    loss(model).backward()
    refused_step(model, optimizer, "lacks 1 of 4, those of `upper`")


# Scaled gradients


@pytest.mark.parametrize("told", [True, False])
def test_gradients_that_are_still_scaled_are_refused(told: bool) -> None:
    model = routed_tower(torch.float32)
    optimizer = sgd(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    handle = attach_filter(optimizer, erasing(model), model=model, scaler=scaler if told else None)
    scaler.scale(loss(model)).backward()
    if told:
        refused_step(model, optimizer, "still multiplied by the scale")
    # scaler.step unscales first, and the hook runs behind that.
    scaler.step(optimizer)
    scaler.update()
    assert handle.steps == 1
    optimizer.zero_grad()
    scaler.scale(loss(model)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert handle.steps == 2


def test_clipping_after_unscaling_is_seen() -> None:
    model = routed_tower(torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    attach_filter(optimizer, erasing(model), model=model, scaler=scaler)
    scaler.scale(loss(model)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trained(model), 1e-3)
    before = values(model)
    with pytest.raises(GradRouteError, match="changed since the backward"):
        scaler.step(optimizer)
    assert same(values(model), before)


def test_a_step_that_the_scaler_skips_is_not_counted_and_the_next_one_is_filtered() -> None:
    model = routed_tower(torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    handle = attach_filter(optimizer, erasing(model), model=model, scaler=scaler)
    scaler.scale(loss(model) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert handle.steps == 0
    optimizer.zero_grad()
    scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    assert handle.steps == 1


def test_fused_optimizers_that_are_given_the_scale_are_refused() -> None:
    model = routed_tower(torch.float32)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=True)
    attach_filter(optimizer, erasing(model), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(loss(model)).backward()
    before = values(model)
    with pytest.raises(GradRouteError, match="with a fused optimizer as well"):
        scaler.step(optimizer)
    assert same(values(model), before)


def test_a_disabled_scaler_scales_nothing() -> None:
    model = routed_tower(torch.float32)
    optimizer = sgd(model)
    handle = attach_filter(optimizer, erasing(model), model=model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    loss(model).backward()
    optimizer.step()
    assert handle.steps == 1


# Wrapped optimizers and models


def test_accelerates_optimizer_is_unwrapped_and_steps_once_per_accumulated_gradient() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = routed_tower()
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    handle = attach_filter(optimizer, erasing(model), model=prepared)
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss(prepared))
            optimizer.step()
            optimizer.zero_grad()
    assert handle.steps == 2
    with pytest.raises(GradRouteError, match="should have one filter"):
        attach_filter(optimizer.optimizer, erasing(model, seed=1), model=model)


def test_accelerates_scaler_is_found() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = routed_tower(torch.float32)
    optimizer = accelerator.prepare_optimizer(sgd(model))
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    attach_filter(optimizer, erasing(model), model=model)
    optimizer.scaler.scale(loss(model)).backward()
    refused_step(model, optimizer.optimizer, "still multiplied by the scale")


def test_engines_that_consume_gradients_in_backward_are_refused() -> None:
    model = routed_tower()

    class DeepSpeedOptimizerWrapper(torch.optim.SGD):
        pass

    with pytest.raises(GradRouteError, match="DeepSpeedOptimizerWrapper, which consumes gradients"):
        attach_filter(DeepSpeedOptimizerWrapper(trained(model)), erasing(model), model=model)
    Zero = type("ZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2", "optimizer": sgd(model)})
    with pytest.raises(GradRouteError, match="ZeroOptimizer, which consumes gradients"):
        attach_filter(Zero(), erasing(model), model=model)
    Engine = type("Engine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    engine = Engine()
    engine.module = model
    renamed = directions_of({f"module.{n}": v for n, v in drawn_directions(model).rows.items()}, model)
    with pytest.raises(GradRouteError, match="Engine, which consumes gradients"):
        attach_filter(sgd(model), ProjectionFilter(renamed, mode="erase"), model=engine)
    loss(model).backward()
    model.lower.lora_A.ds_id = 3
    with pytest.raises(GradRouteError, match="partitioned by DeepSpeed"):
        apply_filter(model, erasing(model))


def test_flat_parameters_are_refused() -> None:
    model = routed_tower()
    loss(model).backward()
    model.lower.lora_A._fsdp_flattened = True
    with pytest.raises(GradRouteError, match=r"FSDP1.*fully_shard \(FSDP2\)"):
        apply_filter(model, erasing(model))


def test_an_optimizer_without_the_deployed_parameters_is_refused() -> None:
    model = routed_tower()
    quarantine_only = torch.optim.SGD([p for _, p in gr.quarantine_parameters(model)], lr=0.1)
    with pytest.raises(GradRouteError, match=r"those of `lower`, `upper`: they"):
        attach_filter(quarantine_only, erasing(model), model=model)
    deployed_only = torch.optim.SGD([p for _, p in gr.deployed_parameters(model)], lr=0.1)
    attach_filter(deployed_only, erasing(model), model=model)
    gains = routed_tower(r_quarantine=2, parametrization="svd_gain")
    routing = ProjectionFilter(drawn_directions(gains), mode="route")
    deployed_only = torch.optim.SGD([p for _, p in gr.deployed_parameters(gains)], lr=0.1)
    with pytest.raises(GradRouteError, match="every parameter of the blocks that is to be trained"):
        attach_filter(deployed_only, routing, model=gains)
    optimizer = sgd(gains)
    handle = attach_filter(optimizer, routing, model=gains)
    loss(gains).backward()
    optimizer.step()
    assert handle.steps == 1


def test_attaching_twice_raises() -> None:
    model = routed_tower()
    optimizer, f = sgd(model), erasing(model)
    attach_filter(optimizer, f, model=model)
    for other, g in ((optimizer, f), (optimizer, erasing(model, seed=1)), (sgd(model), f)):
        with pytest.raises(GradRouteError, match="and a filter one optimizer. Found one that is attached"):
            attach_filter(other, g, model=model)


def test_what_is_no_filter_or_no_optimizer_is_refused() -> None:
    model = routed_tower()
    for call in (lambda f: apply_filter(model, f), lambda f: attach_filter(sgd(model), f, model=model)):
        with pytest.raises(Exception, match="GradientFilter|should be a ProjectionFilter"):
            call("erase")
    with pytest.raises(GradRouteError, match="`optimizer` should be a torch optimizer, .*Found str"):
        attach_filter("sgd", erasing(model), model=model)

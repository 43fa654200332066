"""transformers' Trainer: masks per micro-batch, filters before clipping, refreshes on its steps, resume."""

import warnings
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from support.gradient_directions import drawn_directions
from support.peft_cases import assert_same_tensors, tensors_of
from support.tiny_models import VOCAB, base_model, config
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import gradroute as gr
from gradroute.integrations.transformers import RefreshCallback, RoutedTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning")
STEPS, BATCH = 4, 4
PAIRS = [gr.ContrastivePair([3, 4, 5], [7, 8], [9, 10, 11]), gr.ContrastivePair([6, 4], [7, 9, 8], [12, 10])]


class Rollouts(Dataset):
    """Random tokens, with a zone each."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (6,), generator=generator)
        return {"input_ids": ids, "labels": ids, "zone": torch.randint(3, (), generator=generator)}


class RoutedTrainer(RoutedTrainerMixin, Trainer):
    """What a user writes."""


def masks(inputs: dict[str, Any]) -> gr.RouteMask:
    return gr.RouteMask.zones(inputs.pop("zone"))


def no_masks(inputs: dict[str, Any]) -> gr.RouteMask:
    return gr.RouteMask.zones(["absorb"] * len(inputs.pop("zone")))


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base_model("llama"), config())


def trainer_of(model: nn.Module, folder: Path, kind: type[Trainer] = RoutedTrainer, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("mask_fn", "grad_filter", "callbacks") if name in options}
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_strategy": "no",
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "seed": 0,
        "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**{**settings, **options})
    return kind(model=model, args=arguments, train_dataset=Rollouts(), **given)


class Gradients(TrainerCallback):
    """The deployed gradients that each optimizer step gets."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(torch.cat([p.grad.flatten() for _, p in gr.deployed_parameters(kwargs["model"])]))


def erasing(model: nn.Module) -> gr.ProjectionFilter:
    return gr.ProjectionFilter(drawn_directions(model, 2, seed=1), mode="erase", side="two")


# Masks


def test_masks_of_micro_batches_give_the_weights_of_a_routed_loop_by_hand(tmp_path: Path) -> None:
    made = trainer_of(
        fresh(), tmp_path, mask_fn=masks, gradient_accumulation_steps=2, per_device_train_batch_size=BATCH // 2
    )
    made.train()

    class ByHand(Trainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            with gr.route(model, masks(inputs)):
                return super().training_step(model, inputs, *args, **kwargs)

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    by_hand = trainer_of(fresh(), tmp_path, ByHand, **options)
    by_hand.train()
    assert_same_tensors(tensors_of(made.model), tensors_of(by_hand.model))
    absorbing = trainer_of(fresh(), tmp_path, mask_fn=no_masks, **options)
    absorbing.train()
    name = next(gr.deployed_parameters(made.model))[0]
    assert not torch.equal(tensors_of(absorbing.model)[name], tensors_of(made.model)[name])


def test_what_is_neither_routed_nor_filtered_is_refused(tmp_path: Path) -> None:
    # Under the import hook, types are refused before the library's own checks.
    for options, message in (
        ({}, "Found neither"),
        ({"mask_fn": 3}, "mask_fn"),
        ({"grad_filter": 3}, "ProjectionFilter or a RolloutFilter|grad_filter"),
    ):
        with pytest.raises(Exception, match=message):
            trainer_of(fresh(), tmp_path, **options)


# Filters


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_optimizers_hook_refuses_the_gradients_that_the_trainer_has_clipped(
    tmp_path: Path, max_grad_norm: float
) -> None:
    """The failure that the mixin is there for; without clipping too, since norms are logged by clipping to infinity."""
    for allowed in (False, True):
        model = fresh()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        handle = gr.attach_filter(optimizer, erasing(model), model=model, allow_clipped=allowed)
        made = trainer_of(model, tmp_path, mask_fn=masks, max_grad_norm=max_grad_norm)
        made.optimizer = optimizer
        if allowed:
            made.train()
            assert handle.steps == STEPS
        else:
            with pytest.raises(gr.GradRouteError, match="changed since the backward"):
                made.train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1.0])
def test_filters_run_once_per_step_after_the_last_micro_batch_and_before_clipping(
    tmp_path: Path, max_grad_norm: float
) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2, "max_steps": 1}
    found = []
    for filtered in (True, False):
        model, seen = fresh(), Gradients()
        f = erasing(model)
        made = trainer_of(
            model, tmp_path, mask_fn=masks, max_grad_norm=max_grad_norm if filtered else 0.0, callbacks=[seen],
            grad_filter=f if filtered else None, **options,
        )  # fmt: skip
        made.train()
        found.append(seen.steps[0])
        if filtered:
            assert made.filtered == 1
            assert made.filter_stats.cout < 1e-6 < 1e-3 < made.filter_stats.cin
        else:
            # The gradient without a filter, filtered by hand.
            deployed = [p for _, p in gr.deployed_parameters(model)]
            for p, g in zip(deployed, seen.steps[0].split([p.numel() for p in deployed]), strict=True):
                p.grad = g.reshape(p.shape).clone()
            gr.apply_filter(model, f)
            expected = torch.cat([p.grad.flatten() for _, p in gr.deployed_parameters(model)])
    assert not torch.allclose(expected, found[1])
    if max_grad_norm == 0.0:
        torch.testing.assert_close(found[0], expected)
    else:
        # Clipped by the norm of both blocks, after the filter: the direction is that of the filtered gradient.
        cosine = torch.nn.functional.cosine_similarity(found[0], expected, dim=0)
        assert cosine > 1 - 1e-6
        assert found[0].norm() <= max_grad_norm * (1 + 1e-6)


@pytest.mark.slow
def test_rollout_filters_record_every_micro_batch(tmp_path: Path) -> None:
    model, seen = fresh(), Gradients()
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    scores: list[int] = []

    def everything(found: Tensor) -> Tensor:
        scores.append(len(found))
        return torch.ones(len(found), dtype=torch.bool)

    f = gr.RolloutFilter(directions, everything)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    trainer_of(model, tmp_path, grad_filter=f, mask_fn=no_masks, callbacks=[seen], **options).train()
    assert sum(scores) == BATCH * STEPS
    # Whatever was removed of the deployed gradient was all of it.
    assert max(float(g.norm()) for g in seen.steps) < 1e-6
    plain = Gradients()
    trainer_of(fresh(), tmp_path, mask_fn=no_masks, callbacks=[plain], **options).train()
    assert min(float(g.norm()) for g in plain.steps) > 1e-3


def test_figures_of_filter_and_refresh_are_in_the_log_that_reporters_see(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        seen: list[dict[str, float]]

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(dict(kwargs["logs"]))

    model, reporter = fresh(), Reporter()
    reporter.seen = []
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS)
    refresher = gr.Refresher(directions, lambda: gr.extract_activation_directions(model, PAIRS), model=model, every=2)
    made = trainer_of(
        model, tmp_path, mask_fn=masks, grad_filter=erasing(model), callbacks=[reporter, RefreshCallback(refresher)]
    )
    made.train()
    assert len(refresher.reports) == STEPS // 2
    logged = [entry for entry in reporter.seen if "loss" in entry]
    assert [entry["gradroute/refreshes"] for entry in logged] == [0, 1, 1, 2]
    assert [entry["gradroute/age"] for entry in logged] == [1, 0, 1, 0]
    assert "gradroute/overlap" not in logged[0]
    assert logged[1]["gradroute/overlap"] == refresher.reports[0].overlap < 1
    assert all(entry["gradroute/cout"] < 1e-6 < entry["gradroute/cin"] for entry in logged)
    assert [entry["gradroute/cin"] for entry in made.state.log_history if "loss" in entry] == [
        entry["gradroute/cin"] for entry in logged
    ]


def test_figures_of_modules_are_not_kept_until_the_next_log(tmp_path: Path) -> None:
    model, kept, seen, alive = fresh(), [], [], []

    class Looks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(made.filter_stats.cin)
            kept.append(weakref.ref(made.filter_stats))
            alive.append(sum(stats() is not None for stats in kept))

    made = trainer_of(
        model, tmp_path, mask_fn=masks, grad_filter=erasing(model), callbacks=[Looks()], logging_steps=STEPS
    )
    made.train()
    assert alive == [1] * STEPS
    (logged,) = [entry["gradroute/cin"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx(sum(seen) / STEPS)
    assert len(set(seen)) == STEPS


def test_a_subclass_that_leaves_the_mixin_out_is_found_before_the_step(tmp_path: Path) -> None:
    class Forgets(RoutedTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            inputs.pop("zone")
            return Trainer.training_step(self, model, inputs, *args, **kwargs)

    model = fresh()
    before = tensors_of(model)
    with pytest.raises(gr.GradRouteError, match="once per optimizer step. Found 0 runs before step 1"):
        trainer_of(model, tmp_path, Forgets, grad_filter=erasing(model)).train()
    assert_same_tensors(tensors_of(model), before)


def test_deepspeed_and_scaled_gradients_are_refused_with_a_filter(tmp_path: Path) -> None:
    class OnDeepSpeed(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            type(self.accelerator).distributed_type = "DistributedType.DEEPSPEED"

    class OnFp16(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    kept = accelerate.Accelerator.__dict__["distributed_type"]
    try:
        for engine, message in ((OnDeepSpeed, "under DeepSpeed"), (OnFp16, "under fp16")):
            kind = type("Routed", (RoutedTrainerMixin, engine), {})
            model = fresh()
            with pytest.raises(gr.GradRouteError, match=message):
                trainer_of(model, tmp_path, kind, grad_filter=erasing(model))
            trainer_of(model, tmp_path, kind, mask_fn=masks)
            accelerate.Accelerator.distributed_type = kept
    finally:
        accelerate.Accelerator.distributed_type = kept


# Refreshes


class Run:
    """A routed run with a gate, refreshed every second step, saved every step."""

    def __init__(self, folder: Path, checkpoint: Path | None = None, every: int = 2, model: Any = None) -> None:
        self.model = fresh() if model is None else model
        self.live = self.model
        if checkpoint is None:
            with gr.ablate_quarantine(self.model):
                self.directions = self.extract()
        else:
            self.directions = gr.Directions.load(checkpoint / "gradroute" / "directions.safetensors", model=self.model)
        self.gate = gr.QuantileGate(self.directions, capacity=64, warm_up=2, window=2)
        self.refresher = gr.Refresher(self.directions, self.extract, model=self.model, every=every)
        self.callback = RefreshCallback(self.refresher, gates=[self.gate])
        if checkpoint is not None:
            self.callback.load(checkpoint)
        self.trainer = trainer_of(
            self.model, folder, mask_fn=self.mask, callbacks=[self.callback], save_strategy="steps", save_steps=1
        )

    def extract(self) -> gr.Directions:
        return gr.extract_activation_directions(self.live, PAIRS)

    def mask(self, inputs: dict[str, Any]) -> gr.RouteMask:
        inputs.pop("zone")
        ids = inputs["input_ids"]
        pool = torch.ones_like(ids)
        with torch.no_grad(), gr.ablate_quarantine(self.model), gr.capture_activations(self.model, pool=pool) as acts:
            self.model(input_ids=ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gr.GradRouteWarning)
            return self.gate(acts)


def test_a_run_resumed_with_its_refresher_and_gate_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.trainer.train()
    assert [report.step for report in whole.refresher.reports] == [2, 4]
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    rest = Run(tmp_path / "rest", checkpoint)
    rest.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_tensors(tensors_of(rest.model), tensors_of(whole.model))
    assert_same_tensors(dict(rest.directions.rows), dict(whole.directions.rows))
    assert rest.refresher.reports == whole.refresher.reports
    assert rest.gate.thresholds == whole.gate.thresholds


def test_a_run_resumed_without_them_is_refused(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    with pytest.raises(gr.errors.RefreshError, match="starts at step 3, this callback at 0"):
        Run(tmp_path / "rest").trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(gr.errors.RefreshError, match="starts at step 0, this callback at 3"):
        Run(tmp_path / "anew", checkpoint).trainer.train()
    with pytest.raises(gr.errors.RefreshError, match=r"should hold gradroute/state\.pt"):
        whole.callback.load(tmp_path)
    one = RefreshCallback(whole.refresher)
    with pytest.raises(gr.errors.RefreshError, match="`gates` should be 1, as saved. Found 0"):
        one.load(checkpoint)


def test_a_refresh_that_changes_nothing_ends_the_training(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.live = fresh()  # a copy: what extraction reads is not what is trained
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same|ablated"):
        run.trainer.train()


def test_a_schedule_by_which_no_refresh_would_come_due_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.errors.RefreshError, match="in the 4 optimizer steps of this run"):
        Run(tmp_path, every=5).trainer.train()
    Run(tmp_path, every=4).trainer.train()


def test_a_subclass_ends_its_training_once(tmp_path: Path) -> None:
    ended = []

    class Mine(RefreshCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended.append(state.global_step)
            super().on_train_end(args, state, control, **kwargs)

    model = fresh()
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS)
    refresher = gr.Refresher(directions, lambda: gr.extract_activation_directions(model, PAIRS), model=model, every=2)
    trainer = trainer_of(model, tmp_path, callbacks=[Mine(refresher)], mask_fn=masks)
    trainer.train()
    assert ended == [4]
    assert len(refresher.reports) == 2


@pytest.mark.slow
def test_a_second_training_counts_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.train()
    run.trainer.train()
    assert [report.step for report in run.refresher.reports] == [2, 4, 6, 8]


def test_other_steps_of_optimizer_or_refresher_are_found(tmp_path: Path) -> None:
    class Meddling(TrainerCallback):
        def __init__(self, meddle: Any) -> None:
            self.meddle = meddle

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.meddle(**kwargs)

    run = Run(tmp_path)
    run.trainer.add_callback(Meddling(lambda **kwargs: kwargs["optimizer"].step()))
    with pytest.raises(gr.errors.RefreshError, match="has not taken exactly one"):
        run.trainer.train()
    other = Run(tmp_path)
    other.trainer.add_callback(Meddling(lambda **kwargs: other.refresher.step()))
    with pytest.raises(gr.errors.RefreshError, match="is called by this callback"):
        other.trainer.train()


def test_a_step_that_was_skipped_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GradScaler does after an overflow: no step, and accelerate's wrapper says so."""
    calls: list[bool] = []
    taken = AcceleratedOptimizer.step

    def step(self: Any, closure: Any = None) -> None:
        calls.append(len(calls) == 1)
        if not calls[-1]:
            taken(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: calls[-1]))
    run = Run(tmp_path)
    run.trainer.train()
    assert calls == [False, True, False, False]
    assert run.refresher.steps == STEPS - 1
    assert [report.step for report in run.refresher.reports] == [2]


def test_under_deepspeed_the_steps_that_its_wrapper_took_count(tmp_path: Path) -> None:
    """Its optimizer is stepped inside backward, where no hook of torch's runs."""
    run, state = Run(tmp_path), TrainerState(max_steps=STEPS)
    optimizer = type("DeepSpeedOptimizerWrapper", (), {"step_was_skipped": False})()
    run.callback.on_train_begin(run.trainer.args, state, None, optimizer=optimizer)
    for skipped in (False, True, False):
        optimizer.step_was_skipped = skipped
        run.callback.on_step_end(run.trainer.args, state, None, optimizer=optimizer)
    assert run.refresher.steps == 2
    assert len(run.refresher.reports) == 1


def test_what_is_no_refresher_is_refused() -> None:
    with pytest.raises(Exception, match="should be a Refresher. Found str|refresher"):
        RefreshCallback("every 5")

"""What cannot be routed in TRL raises at construction, with the reason; so does a TRL that is not as expected."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig
from support.tiny_models import base_model, config
from support.trl_runs import PAIRS, Watched, extract, flags, quiet, trainer, wrapped
from trl import GRPOTrainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer
from gradroute.integrations.trl._requirements import METHODS, check_run, check_trl
from gradroute.integrations.trl.grpo_config import Options

pytestmark = quiet


def built(**options: Any) -> SimpleNamespace:
    """A trainer as far as `check_run` looks at it, with some option on."""
    fsdp_plugin = SimpleNamespace(fsdp_version=options.pop("fsdp_version", 1))
    state = SimpleNamespace(deepspeed_plugin=options.pop("plugin", None), fsdp_plugin=fsdp_plugin)
    args = SimpleNamespace(**{key: value for key, value in options.items() if key in ARGUMENTS})
    rest = {key: value for key, value in options.items() if key not in ARGUMENTS}
    return SimpleNamespace(
        **{"args": args, "accelerator": SimpleNamespace(state=state), "model": wrapped(), "num_generations": 4, **rest}
    )


ARGUMENTS = ("use_liger_kernel", "use_transformers_continuous_batching", "fp16")
REFUSED = {
    "liger": ({"use_liger_kernel": True}, "replaces forwards"),
    "continuous batching": ({"use_transformers_continuous_batching": True}, "rows are packed"),
    "rollout_func": ({"rollout_func": print}, "which view it samples"),
    "tools": ({"tools": [print]}, "after a tool call"),
    "images": ({"_is_vlm": True}, "rows of its vision tower"),
    "deepspeed with a filter": ({"is_deepspeed_enabled": True}, "has consumed the gradients"),
    "deepspeed with a slow start": ({"is_deepspeed_enabled": True}, "would not start slowly"),
    "fsdp of version 1": ({"is_fsdp_enabled": True}, "FSDP version 1.*`fsdp_version: 2`"),
    "fp16 with a filter": ({"fp16": True}, "gradients are scaled"),
    "no PEFT": ({"model": base_model("llama")}, "trained through PEFT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_that_cannot_be_routed_is_refused_with_the_reason(case: str) -> None:
    for fine in ({}, {"is_fsdp_enabled": True, "fsdp_version": 2}):
        check_run(built(**fine), Options(ablated_fraction=0.25, grad_filter=print, slow_start_steps=1))
    options, reason = REFUSED[case]
    asked = {"grad_filter": print} if "filter" in case else {"slow_start_steps": 1} if "slow" in case else {}
    with pytest.raises(gr.GradRouteError, match=reason):
        check_run(built(**options), Options(ablated_fraction=0.25, **asked))


def test_the_trainer_asks(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="after a tool call|gradients are scaled|replaces forwards"):
        trainer(
            tmp_path, detector=flags, args_use_liger_kernel=True,
            cls=type("Quiet", (GradRouteGRPOTrainer,), {"__init__": ignoring_liger}),
        )  # fmt: skip
    with pytest.raises(gr.GradRouteError, match="should contain routed layers"):
        plain = LoraConfig(r=2, target_modules="all-linear")
        trainer(tmp_path, base_model("llama"), detector=flags, peft_config=plain)


def ignoring_liger(self: Any, *args: Any, **kwargs: Any) -> None:
    """Liger is not installed here: TRL is told so only after it was built."""
    kwargs["args"].use_liger_kernel = False
    build = GRPOTrainer.__init__

    def then_on(trainer: Any, *inner: Any, **given: Any) -> None:
        build(trainer, *inner, **given)
        trainer.args.use_liger_kernel = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "__init__", then_on)
        GradRouteGRPOTrainer.__init__(self, *args, **kwargs)


ARGUMENT_ERRORS = {
    "nothing": ({}, "nothing to route by"),
    "share": ({"detector": flags, "ablated_fraction": 0.3}, "whole number of the 4 rollouts"),
    "share of all": ({"detector": flags, "ablated_fraction": 1.0}, r"in \[0, 1\)"),
    "labels": ({"gate": gr.LabelGate()}, "needs labels"),
    "scores": ({"gate": gr.ThresholdGate(0.0)}, "needs scores"),
    "gate of nothing": ({"gate": gr.BandGate}, "Found no `directions`"),
    "not a gate": ({"gate": 0.5}, "`gate` should be a Gate"),
    "not a filter": ({"grad_filter": "erase"}, "`grad_filter` should be a GradientFilter"),
    "refresh of nothing": ({"detector": flags, "refresher": 5}, "Found no function"),
    "refresher": ({"directions": extract, "refresher": "often"}, "number of optimizer steps"),
    "unread": ({"directions": extract, "gate": gr.LabelGate(), "detector": flags}, "`directions` should be of"),
    "baseline of nothing": (
        {"ablated_fraction": 0.25, "clean_baseline": True}, "Found nothing that flags before backward",
    ),
    "entropy": ({"detector": flags, "args_entropy_coef": 0.1}, "an entropy bonus"),
    "no function": ({"detector": "later"}, "`detector` should be a function"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENT_ERRORS)
def test_arguments_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    options, reason = ARGUMENT_ERRORS[case]
    with pytest.raises(gr.GradRouteError, match=reason):
        trainer(tmp_path, **options)


@pytest.mark.corner(
    "the TRL trainer is given directions that were extracted with the quarantine on", "`GradRouteError` at construction"
)
def test_directions_of_another_view_than_rollouts_are_scored_in_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(gr.GradRouteError, match="extracted with the quarantine ablated.*view 'on'"):
        trainer(tmp_path, model, directions=extract(model))
    with gr.ablate_quarantine(model):
        directions = extract(model)
    assert trainer(tmp_path, model, directions=directions).routing.gate.directions is directions


def test_a_gate_of_log_ratios_is_refused(tmp_path: Path) -> None:
    class Ratio(gr.LabelGate):
        reads = "log_ratios"

    with pytest.raises(gr.GradRouteError, match="Found a Ratio, which reads log ratios.*Fix: log_ratio_gate="):
        trainer(tmp_path, gate=Ratio())


def test_directions_of_gradients_are_for_filters(tmp_path: Path) -> None:
    model = wrapped()
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    with pytest.raises(gr.GradRouteError, match="A gate scores rollouts by activations"):
        trainer(tmp_path, model, directions=directions)
    with pytest.raises(gr.GradRouteError, match="decides after backward"):
        trainer(
            tmp_path, model, grad_filter=gr.RolloutFilter(directions), detector=flags, clean_baseline=True
        )  # fmt: skip


def test_a_trl_without_what_is_overridden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl(GRPOTrainer)
    lacking = {name: getattr(GRPOTrainer, name) for name in METHODS}
    lacking["compute_loss"] = lambda self, model, batch: None
    with pytest.raises(gr.GradRouteError, match="compute_loss.*none called inputs"):
        check_trl(SimpleNamespace(**lacking))
    del lacking["compute_loss"]
    with pytest.raises(gr.GradRouteError, match="compute_loss.*no such method"):
        check_trl(SimpleNamespace(**lacking))
    monkeypatch.setattr(trl, "__version__", "0.29.1")
    with pytest.raises(gr.GradRouteError, match=r"1\.0 or newer. Found 0\.29\.1"):
        check_trl(GRPOTrainer)


def test_a_detector_of_scores_feeds_a_threshold(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, cls=Watched, gate=gr.ThresholdGate(3.0), args_max_steps=1,
        detector=lambda completions, **_: [float(len(text.split())) for text in completions],
    )  # fmt: skip
    made.train()
    for batch in made.micro_batches[0]:
        words = (batch["completion_ids"] > 2).sum(1)
        assert (batch["route_score"] == words).all()
        assert ((batch["route_g_d"] == 0) >= (words >= 3)).all()
    assert made.state.log_history[0]["routing/score"] > 0


def test_adapters_called_ref_that_are_no_copy_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    model.add_adapter("ref", config())
    torch.manual_seed(1)
    with pytest.raises(gr.GradRouteError, match="should start as a copy of `default`"):
        trainer(tmp_path, model, detector=flags)

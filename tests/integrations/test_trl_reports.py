"""What leaves a run: metrics under one prefix, to whatever `report_to` names, and TRL's model card."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset
from support.trl_runs import PAIRS, PROMPTS, extract, flags, quiet, trained, trainer, wrapped
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from trl import GRPOTrainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOConfig, GradRouteGRPOTrainer, GradRouteMixin

pytestmark = quiet
ROUTED: dict[str, Any] = {"directions": extract, "refresher": 1, "detector": flags, "slow_start_steps": 1}


class Reporter(TrainerCallback):
    """Stands for W&B's or trackio's: keeps what it is given under the names that they show."""

    config: ClassVar[dict[str, Any]]
    shown: ClassVar[list[dict[str, Any]]]

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        type(self).config, type(self).shown = args.to_dict(), []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        type(self).shown.append(integration_utils.rewrite_logs(logs))


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_service_that_report_to_names_sees_options_and_metrics(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, service, Reporter)
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    trained(
        tmp_path, **ROUTED, evaluated=rows, config=GradRouteGRPOConfig, args_report_to=[service],
        args_ablated_fraction=0.25, args_log_ratio_gate=2.0, args_eval_strategy="steps", args_eval_steps=2,
    )  # fmt: skip
    assert Reporter.config["ablated_fraction"] == 0.25
    first, shown = Reporter.shown[0], {name for logs in Reporter.shown for name in logs}
    assert first["train/routing/slow_start"] == 1
    assert first["train/routing/directions_age"] == 0
    names = ("flag_rate", "ablated", "score", "z", "detector_rate", "log_ratio_flagged", "directions_overlap")
    assert {f"train/routing/{name}" for name in names} <= first.keys()
    assert {f"eval/{view}_reward" for view in ("on", "ablated")} <= shown


def test_whatever_a_routed_run_logs_and_trls_does_not_is_under_one_prefix(tmp_path: Path) -> None:
    plain = trained(tmp_path, wrapped(), cls=GRPOTrainer)
    directions = gr.extract_gradient_directions(wrapped(), PAIRS, features="parameter")
    filtered = trained(tmp_path, grad_filter=gr.ProjectionFilter(directions, mode="erase"))
    routed = trained(tmp_path, **ROUTED, detector_recall=1.0, log_ratio_gate=2.0, ablated_fraction=0.25, ablated_from=0)
    known = {name for entry in plain.state.log_history for name in entry}
    for made, expected in ((filtered, "routing/filter_cin"), (routed, "routing/directions_angle")):
        ours = {name for entry in made.state.log_history for name in entry} - known
        assert expected in ours
        assert all(name.startswith("routing/") for name in ours), ours


def test_trls_model_card_says_that_gradients_were_routed(tmp_path: Path) -> None:
    class Other(GRPOTrainer):  # type: ignore[misc]
        _tag_names: ClassVar[list[str]] = ["trl", "mine"]

    class Mine(GradRouteMixin, Other):  # type: ignore[misc]
        pass

    for cls, tags in ((GradRouteGRPOTrainer, ["trl", "grpo"]), (Mine, ["trl", "mine"])):
        made = trainer(tmp_path, cls=cls, detector=flags)
        assert made._tag_names == [*tags, "gradient-routing"]
        assert set(made.model.model_tags) == {*tags, "gradient-routing"}
        made.create_model_card("policy")
        card = (tmp_path / "README.md").read_text()
        assert "- gradient-routing\n" in card
        assert (
            "trained with GRPO with gradient routing, a method introduced in [Gradient Routing: Masking Gradients to "
            "Localize Computation in Neural Networks](https://huggingface.co/papers/2410.04332)."
        ) in card
        assert "arXiv:2410.04332" in card
        assert GRPOTrainer._paper["citation"] in card

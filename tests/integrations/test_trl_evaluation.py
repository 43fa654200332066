"""An evaluation shows both views, of every data set, under names of their own, and leaves training as it was."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset
from support.trl_runs import PROMPTS, extract, flags, quiet, trainer, wrapped
from trl import GRPOTrainer

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.integrations.trl import GradRouteGRPOTrainer

pytestmark = quiet
SETS = {name: Dataset.from_dict({"prompt": PROMPTS[i : i + 2]}) for i, name in ((0, "easy"), (2, "hard"))}


class Views(GradRouteGRPOTrainer):
    """Keeps the view in which the model generates."""

    views: list[set[str]]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        layers = routed_layers(self.model).values()
        handle = next(iter(layers)).register_forward_pre_hook(
            lambda *_: self.views.append({layer.view for layer in layers})
        )
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            handle.remove()


def test_plain_trl_logs_every_data_set_under_one_name(tmp_path: Path) -> None:
    """The collision that is guarded against."""
    plain = trainer(tmp_path, wrapped(), cls=GRPOTrainer, evaluated=SETS)
    plain.evaluate()
    rewards = [[name for name in entry if name.endswith("_reward")] for entry in plain.state.log_history]
    assert rewards == [["eval_reward"], ["eval_reward"]]


def test_views_and_data_sets_have_metrics_of_their_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, detector=flags, evaluated=SETS, args_beta=0.1)
    metrics = made.evaluate()
    logged = [name for entry in made.state.log_history for name in entry if name not in ("epoch", "step")]
    assert len(logged) == len(set(logged))
    for view in ("on", "ablated"):
        for data in SETS:
            for figure in ("loss", "reward", "completions/mean_length", "routing/detector_rate", "kl"):
                assert f"eval_{view}_{data}_{figure}" in metrics
    assert all(name.startswith(("eval_on_", "eval_ablated_", "epoch")) for name in metrics)
    assert metrics["eval_on_easy_reward"] != metrics["eval_ablated_easy_reward"]


def test_each_view_generates_in_itself_and_training_is_as_before(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, cls=Views, directions=extract, gate=lambda d: gr.QuantileGate(d, warm_up=4), evaluated=SETS["easy"],
        args_max_steps=1,
    )  # fmt: skip
    made.views = []
    made.evaluate()
    assert made.views[0] == {"on"}
    assert made.views[-1] == {"ablated"}
    assert len(made.routing.gate) == 0  # the gate learns from rollouts that are trained on alone
    assert {layer.view for layer in routed_layers(made.model).values()} == {"on"}
    made.views.clear()
    made.train()
    assert len(made.routing.gate) == 8
    assert all(view == {"on"} for view in made.views)


def test_evaluation_in_the_middle_of_a_run_and_a_table_of_completions(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, detector=flags, detector_recall=1.0, ablated_fraction=0.5, evaluated=SETS["easy"],
        args_eval_strategy="steps", args_eval_steps=1, args_log_completions=True, args_num_completions_to_print=1,
    )  # fmt: skip
    made.train()
    names = [name for entry in made.state.log_history for name in entry]
    assert names.count("eval_on_reward") == names.count("eval_ablated_reward") == 2
    assert names.count("reward") == names.count("routing/flag_rate") == 2
    tables = {path.stem: pandas.read_parquet(path) for path in (tmp_path / "completions").iterdir()}
    steps = [f"completions_0000{step}" for step in (1, 2)]
    # TRL writes the last one once more at the end of a run.
    assert tables.keys() == {f"{step}{view}" for step in steps for view in ("", "_eval_on", "_eval_ablated")}
    assert sorted(tables[steps[0]]["view"]) == ["ablated"] * 4 + ["on"] * 4
    assert set(tables[f"{steps[0]}_eval_ablated"]["view"]) == {"ablated"}
    assert all(
        {"zone", "score", "log_ratio", "completion", "reward"} <= set(table.columns) for table in tables.values()
    )


def test_views_without_a_quarantine_would_not_differ(tmp_path: Path) -> None:
    """What `eval_on_*` and `eval_ablated_*` show is the quarantine: without one, and with equal noise, nothing."""
    model = wrapped()
    for name, parameter in gr.quarantine_parameters(model):
        if "lora_B" in name:
            parameter.data.zero_()
    made = trainer(tmp_path, model, detector=flags, evaluated=SETS["easy"])
    views = []
    for view, ablation in (("on", nullcontext()), ("ablated", gr.ablate_quarantine(made.model))):
        torch.manual_seed(1)
        made._view = view
        with ablation:
            views.append(made.evaluate(metric_key_prefix=view)[f"{view}_reward"])
    assert views[0] == views[1]

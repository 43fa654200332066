"""A run that is resumed goes on as if it had never stopped, also in the middle of a batch of rollouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import randomize_blocks
from support.trl_runs import Watched, extract, flags, quiet, trainer, wrapped

import gradroute as gr
from gradroute.integrations.trl import _resume

pytestmark = [
    *quiet,
    pytest.mark.slow,
    # PEFT cannot ask for the config of a base model that has no name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
STEPS, SAVED_AT = 5, 3
# New rollouts every two steps: the checkpoint is taken with half of them still to be trained on.
RUN = {
    "args_max_steps": STEPS, "args_num_iterations": 2, "args_save_strategy": "steps", "args_save_steps": SAVED_AT,
    "args_scale_rewards": "group", "refresher": 2, "ablated_fraction": 0.25,
}  # fmt: skip
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    # Saved in the middle of the slow start; the last rollouts are the first of which some are sampled ablated.
    "quantile gate, log ratios, slow start": lambda: {
        "gate": lambda directions: gr.QuantileGate(directions, warm_up=4),
        "log_ratio_gate": gr.LogRatioGate(0.3, below="keep"), "slow_start_steps": 4,
    },
    "band gate and detector": lambda: {"detector": flags, "detector_recall": 1.0},
}  # fmt: skip


def started(folder: Path, seed: int, kind: str) -> Watched:
    return trainer(
        folder, randomize_blocks(wrapped(), seed, std=0.3), cls=Watched, directions=extract, **RUN, **KINDS[kind]()
    )


def state(made: Watched) -> dict[str, Any]:
    directions = made.routing.directions
    tensors = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    for group in ("rows", "hack", "clean"):
        tensors |= {f"{group}.{name}": value for name, value in getattr(directions, group).items()}
    for block, state_of in made.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{block}.{name}": torch.as_tensor(value) for name, value in state_of.items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_continues_identically(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = started(tmp_path, 0, kind)
    whole.train()
    file = tmp_path / f"checkpoint-{SAVED_AT}"
    assert {path.name for path in file.iterdir()} >= {"gradroute_rank_0.pt", "gradroute_directions_0.safetensors"}

    rest = started(tmp_path / "rest", 7, kind)
    rest.train(resume_from_checkpoint=str(file))
    assert len(rest.micro_batches) == STEPS - SAVED_AT
    for step, expected in zip(rest.micro_batches, whole.micro_batches[SAVED_AT:], strict=True):
        for found, batch in zip(step, expected, strict=True):
            assert found.keys() == batch.keys()
            assert all(torch.equal(found[key], batch[key]) for key in batch)
    expected = state(whole)
    found = state(rest)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    assert rest.routing.refresher.reports == whole.routing.refresher.reports
    assert len(rest.routing.refresher.reports) == STEPS // 2
    if kind != "band gate and detector":
        assert len(rest.routing.gate) == len(whole.routing.gate) == 24
        assert rest.routing.log_ratio_gate.figures == whole.routing.log_ratio_gate.figures
        assert rest.routing.log_ratio_gate.figures.rows == 24
        slow = [[entry["routing/slow_start"] for entry in made.state.log_history[:STEPS]] for made in (whole, rest)]
        assert slow == [[1, 1, 1, 1, 0]] * 2

    monkeypatch.setattr(_resume, "load", lambda *_: None)
    forgetful = started(tmp_path / "forgetful", 7, kind)
    forgetful.train(resume_from_checkpoint=str(file))
    assert [name for name in expected if not torch.equal(state(forgetful)[name], expected[name])]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    started(tmp_path, 0, "band gate and detector").train()
    file = tmp_path / f"checkpoint-{SAVED_AT}"
    other = started(tmp_path / "other", 0, "quantile gate, log ratios, slow start")
    with pytest.raises(gr.errors.FileFormatError, match=r"slow start\) = .*True, True.*Found .*False, False"):
        other.train(resume_from_checkpoint=str(file))
    quantile = {"gate": lambda directions: gr.QuantileGate(directions, warm_up=4), "detector": flags}
    other = trainer(tmp_path / "third", directions=extract, detector_recall=1.0, **RUN, **quantile)
    with pytest.raises(gr.errors.FileFormatError, match="QuantileGate"):
        other.train(resume_from_checkpoint=str(file))
    (file / "gradroute_rank_0.pt").unlink()
    with pytest.raises(gr.errors.FileFormatError, match="not saved by a routed trainer"):
        started(tmp_path / "again", 0, "band gate and detector").train(resume_from_checkpoint=str(file))

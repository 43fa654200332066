"""A warning where rollouts that are sampled ablated may be missed hacks, and none where a run knows better."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.trl_runs import extract, flags, quiet, trainer

import gradroute as gr
from gradroute.integrations.trl._resolve import known_recall

pytestmark = quiet
ABLATED = {"ablated_fraction": 0.25}
WARNED: dict[str, tuple[dict[str, Any], float | None]] = {
    "labels": ({"detector": flags}, None),
    "labels of known recall": ({"detector": flags, "detector_recall": 0.5}, 0.5),
    "simulated recall": ({"detector": flags, "detector_recall": 1.0, "gate": gr.LabelGate(recall=0.4)}, 0.4),
    "band": ({"directions": extract, "gate": partial(gr.BandGate, threshold=1e3)}, 0.0),
    "soft": ({"directions": extract, "gate": partial(gr.BandGate, soft=True)}, None),
    "quantiles": ({"directions": extract, "gate": gr.QuantileGate}, None),
    "threshold of a detector": ({"detector": flags, "gate": gr.ThresholdGate(0.5)}, None),
    "threshold of directions": ({"directions": extract, "gate": gr.ThresholdGate(1e9)}, 0.0),
}
QUIET: dict[str, tuple[dict[str, Any], float | None]] = {
    "a detector that misses few": ({"detector": flags, "detector_recall": 0.95}, 0.95),
    "a band below all hack pairs": ({"directions": extract, "gate": partial(gr.BandGate, threshold=-1e3)}, 1.0),
    "the better of two": (
        {"directions": extract, "gate": partial(gr.BandGate, threshold=1e3), "detector": flags, "detector_recall": 0.9},
        0.9,
    ),
}


@pytest.mark.corner(
    "rollouts are sampled ablated, and a detector may miss hacks", "a warning says so at construction, with the fix"
)
@pytest.mark.parametrize("case", WARNED)
def test_missed_hacks_that_were_sampled_ablated_are_warned_of(case: str, tmp_path: Path) -> None:
    options, recall = WARNED[case]
    found = "is not known" if recall is None else f"{recall:.2g} of hacks are flagged"
    with pytest.warns(gr.GradRouteWarning, match=f"missed hacks may be among them.*{found}.*Fix: log_ratio") as warned:
        made = trainer(tmp_path, **options, **ABLATED)
    assert len([each for each in warned if issubclass(each.category, gr.GradRouteWarning)]) == 1
    assert known_recall(made.routing) == recall


@pytest.mark.parametrize("case", QUIET)
def test_a_run_that_flags_nearly_all_hacks_is_not_warned(case: str, tmp_path: Path) -> None:
    options, recall = QUIET[case]
    assert known_recall(trainer(tmp_path, **options, **ABLATED).routing) == recall


def test_without_ablated_rollouts_or_with_a_gate_on_log_ratios_there_is_no_warning(tmp_path: Path) -> None:
    trainer(tmp_path, detector=flags)
    trainer(tmp_path, detector=flags, log_ratio_gate=gr.LogRatioGate(), **ABLATED)


def test_a_recall_is_a_share_and_of_a_detector(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="`detector_recall` should be a share"):
        trainer(tmp_path, detector=flags, detector_recall=1.5)
    with pytest.raises(gr.GradRouteError, match="is of a `detector`"):
        trainer(tmp_path, directions=extract, detector_recall=1.0)

"""Every public function, called wrongly in the ways that are likely, and the word that the message has to have.

Run as a program it prints each message: `python tests/support/wrong_calls.py`.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import gradroute as gr
from gradroute.directions.estimators import MeanDifference, Ridge, Svd, TStatistic
from gradroute.evaluation import Controls, Criteria, Rate, dose_curve
from support.call_arguments import (
    ERASE,
    GRADIENT,
    HACK,
    IDS,
    MASK,
    MODEL,
    OPTIMIZER,
    PAIRS,
    POOL,
    RANDOM,
    RECORD,
    REPORT,
    ROUTE,
    SHUFFLE,
    backward,
    extract,
    outcomes,
)
from support.wrong_direction_calls import DIRECTION_CALLS
from support.wrong_evaluation_calls import EVALUATION_CALLS
from support.wrong_model_calls import MODEL_CALLS
from support.wrong_routing_calls import ROUTING_CALLS

TABLE = {**MODEL_CALLS, **DIRECTION_CALLS, **ROUTING_CALLS, **EVALUATION_CALLS}


class Wrong(NamedTuple):
    """A call of one public function that must raise, and the words that its message needs to have."""

    function: str
    named: str
    call: Callable[[], Any]


def wrong_calls() -> Iterator[Wrong]:
    """All of them."""
    for function, table in TABLE.items():
        for named, call in table:
            yield Wrong(function, named, call)


def answers() -> Iterator[dict[str, str]]:
    """What each call raised."""
    for wrong in wrong_calls():
        kind, message = "nothing", ""
        try:
            wrong.call()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        yield {"function": wrong.function, "named": wrong.named, "type": kind, "message": message}


def reprs() -> tuple[list[str], list[str]]:
    """Those of public objects that are lines, and those that are tables."""
    with torch.no_grad(), gr.capture_activations(MODEL, pool=POOL) as acts:
        MODEL(IDS)
    backward()
    stats = gr.apply_filter(MODEL, ERASE)
    with gr.audit_updates(MODEL, OPTIMIZER) as audits:
        OPTIMIZER.step()
        audit = audits.read()
    refresher = gr.Refresher(HACK, extract, model=MODEL, every=5)
    validation = gr.directions.validate(torch.tensor([2.0, 1.0]), torch.tensor([True, False]))
    lines: list[Any] = [
        MASK, HACK, HACK.provenance, acts, stats, audit, audits, refresher, refresher.refresh(), ERASE, PAIRS[0],
        gr.RolloutFilter(GRADIENT), gr.RolloutFilter(GRADIENT, lambda scores: scores > 0), gr.BandGate(HACK),
        gr.ThresholdGate(0.5), gr.LabelGate(), gr.LogRatioGate(), gr.QuantileGate(HACK), Rate(1, 2), RECORD,
        ROUTE, Criteria(), Controls(SHUFFLE), Controls(SHUFFLE, [RANDOM]), Svd(k=2), Ridge(), MeanDifference(),
        TStatistic(), gr.parameter_summary(MODEL), outcomes(3), validation,
        gr.check_model(MODEL), gr.check_model(nn.MultiheadAttention(4, 2)),
    ]  # fmt: skip
    tables = [REPORT, gr.directions.summary(HACK), dose_curve(MODEL, lambda _: [RECORD])]
    return [repr(each) for each in lines], [repr(each) for each in tables]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = list(answers())
    if "--json" in sys.argv:
        as_lines, as_tables = reprs()
        print(json.dumps({"answers": found, "lines": as_lines, "tables": as_tables}))
    else:
        for each in found:
            print(f"{each['function']} ({each['named']}): {each['type']}: {each['message']}")

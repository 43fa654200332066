"""One logger, quiet by default: a line per refresh and per warning. Bars only where somebody looks at them."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.language_models import PAIRS, ids_only, routed_mixer, scoring_directions

import gradroute as gr
from gradroute import _logging

pytestmark = pytest.mark.touches_peft


def test_a_refresh_is_one_line_at_info(caplog: pytest.LogCaptureFixture) -> None:
    model = routed_mixer()

    def extract() -> gr.Directions:
        return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)

    refresher = gr.Refresher(extract(), extract, model=model, every=1)
    for _, parameter in gr.deployed_parameters(model):
        parameter.data += 0.01
    with caplog.at_level(logging.INFO, logger="gradroute"):
        report = refresher.step()
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [("gradroute", logging.INFO, repr(report))]
    assert "\n" not in repr(report)


def test_a_warning_is_raised_and_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(gr.GradRouteWarning, match="score below the clean") as found:
        gr.BandGate(scoring_directions([0.0, 0.0], [2.0, 2.0]))
    assert [(r.name, r.levelno) for r in caplog.records] == [("gradroute", logging.WARNING)]
    assert caplog.records[0].getMessage() == str(found[0].message)


def test_a_warning_points_to_the_users_line_however_deep_it_is_found() -> None:
    directions = scoring_directions([2.0], [0.0])
    gate, soft = gr.BandGate(directions, window=1), gr.BandGate(directions, soft=True)
    directions.update_(scoring_directions([0.0], [2.0]), step=1)
    for warns, message in (
        (lambda: gr.LabelGate(false_positive_rate=0.2), "false_positive_rate"),
        (lambda: soft(torch.tensor([1.0])), "score below the clean"),
        (lambda: gate.reversed, "score below the clean"),
        (lambda: gate(torch.tensor([9.0])), "routed nothing"),
        (lambda: gr.directions.validate(torch.tensor([0.0, 1.0]), torch.tensor([True, False])), "AUROC"),
    ):
        with pytest.warns(gr.GradRouteWarning, match=message) as found:
            warns()
        assert [each.filename for each in found] == [__file__]


@pytest.mark.slow
def test_the_logger_prints_nothing_unless_asked() -> None:
    warn = "import warnings, gradroute as gr; warnings.simplefilter('ignore'); gr.LabelGate(false_positive_rate=.5)"
    for setup, lines in (("", 0), ("import logging; logging.basicConfig(); ", 1)):
        said = subprocess.run([sys.executable, "-c", setup + warn], capture_output=True, text=True, check=True)
        assert said.stdout == ""
        assert len(said.stderr.splitlines()) == lines, said.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def extracted(model: Any, **options: Any) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, batch_size=2, **options)


def dosed(model: Any, **options: Any) -> gr.evaluation.DoseCurve:
    return gr.evaluation.dose_curve(model, lambda _: [gr.EvalRecord("file", False, 0, True, False)], **options)


@pytest.mark.parametrize("measure", [extracted, dosed])
def test_bars_are_shown_on_a_terminal_and_can_be_turned_off(
    measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed_mixer()
    monkeypatch.setattr(_logging, "_DELAY", 0.0)
    shown = []
    for stream, options in ((Terminal(), {}), (Terminal(), {"progress": False}), (io.StringIO(), {})):
        monkeypatch.setattr(sys, "stderr", stream)
        measure(model, **options)
        shown.append("it/s" in stream.getvalue() or "0/" in stream.getvalue())
    assert shown == [True, False, False]


def test_what_is_quick_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    extracted(routed_mixer())
    assert terminal.getvalue() == ""


def test_a_bar_changes_no_result() -> None:
    model = routed_mixer()
    assert torch.equal(extracted(model, progress=False).rows["q"], extracted(model).rows["q"])

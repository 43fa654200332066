"""Pictures: what is drawn is what was measured, with its n, told apart without colour; and matplotlib stays out."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from support.language_models import routed_mixer, scoring_directions
from torch import nn

import gradroute as gr

pytestmark = pytest.mark.touches_peft

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Under the import hook the type checker may be first."""
    with pytest.raises((gr.GradRouteError, TypeError)) as raised:
        yield
    assert message in str(raised.value) or not isinstance(raised.value, gr.GradRouteError)


def evaluated(model: nn.Module) -> list[gr.EvalRecord]:
    """Hack rates in proportion to what the quarantine adds: the scale of the view in eighths."""
    layer, *others = (module for module in model.modules() if isinstance(module, gr.QuarantineLoRA))
    x = torch.ones(1, layer.in_features, dtype=torch.float64)
    for other in others:
        other(x)
    with torch.no_grad():
        now, ablated = (
            layer(x),
            layer.base_layer(x) + layer.deployed.scaling * x @ layer.deployed.A.T @ layer.deployed.B.T,
        )
        full = layer.quarantine.scaling * x @ layer.quarantine.A.T @ layer.quarantine.B.T
    share = ((now - ablated) / full).mean().item()
    return [gr.EvalRecord("file", False, i, i < round(8 * share), i % 2 == 0) for i in range(8)]


def values(ax: Any) -> dict[str, list[float]]:
    """Drawn values by label."""
    _, names = ax.get_legend_handles_labels()
    lines = [container.lines[0] for container in ax.containers]
    return {name: list(map(float, line.get_ydata())) for name, line in zip(names[-len(lines) :], lines, strict=True)}


def is_grey(artist: Any) -> bool:
    red, green, blue = to_rgb(artist.get_color())
    return red == green == blue


def test_a_report_draws_each_group_with_its_n_and_its_rates() -> None:
    report = gr.evaluate_on_off(routed_mixer(), evaluated)
    fig, ax = report.plot()
    assert fig is ax.figure
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["held-out\nn = 8", "file\nn = 8"]
    drawn = {c.get_label(): list(c.lines[0].get_xdata()) for c in ax.containers}
    assert drawn == {"hack, on": [1, 1], "hack, ablated": [0, 0], "solve, on": [0.5] * 2, "solve, ablated": [0.5] * 2}
    styles = {(line.get_marker(), line.get_markerfacecolor()) for line in (c.lines[0] for c in ax.containers)}
    assert len(styles) == 4
    assert all(is_grey(container.lines[0]) for container in ax.containers)
    low, high = gr.evaluation.Rate(8, 8).interval
    assert (low, high) != (1, 1)
    bar = ax.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0].tolist() == pytest.approx([low, high])


def test_a_dose_curve_is_measured_and_drawn() -> None:
    curve = gr.evaluation.dose_curve(routed_mixer(), evaluated, scales=(1.0, 0.0, 0.5))
    assert {scale: view.hack["file"].k for scale, view in curve.rates.items()} == {0.0: 0, 0.5: 4, 1.0: 8}
    assert repr(curve).splitlines()[2].startswith("0.5    0.50 [")
    _, ax = curve.plot("file")
    assert values(ax) == {"hack": [0, 0.5, 1], "solve": [0.5] * 3}
    assert ax.get_title() == "file, n = 8"
    with pytest.raises(gr.GradRouteError, match=r"`group` should have prompts. Found 'monitored'. Fix: one of"):
        curve.plot("monitored")


@pytest.mark.parametrize("scales", [(0.5,), (0.0, 0.0), (0.0, 1.5)])
def test_scales_that_make_no_curve_raise(scales: tuple[float, ...]) -> None:
    with pytest.raises(gr.GradRouteError, match="`scales` should be two or more different numbers"):
        gr.evaluation.dose_curve(routed_mixer(), evaluated, scales=scales)


def test_other_prompts_at_another_scale_raise() -> None:
    ids = iter(range(100))
    with pytest.raises(gr.GradRouteError, match="same prompts at every scale"):
        gr.evaluation.dose_curve(routed_mixer(), lambda _: [gr.EvalRecord("file", False, next(ids), True, False)])
    with pytest.raises(gr.GradRouteError, match="at least one record. Found none at scale 0"):
        gr.evaluation.dose_curve(routed_mixer(), lambda _: [])
    model = routed_mixer()
    with gr.ablate_quarantine(model), pytest.raises(gr.GradRouteError, match="in its on view. Found 'ablated'"):
        gr.evaluation.dose_curve(model, evaluated)


def test_training_curves_show_both_views_and_the_refreshes() -> None:
    report = gr.evaluate_on_off(routed_mixer(), evaluated)
    _, ax = gr.evaluation.plot_training({10: report, 0: report}, group="file", refreshed_at=[5])
    assert values(ax)["hack, on"] == [1, 1]
    assert values(ax)["hack, ablated"] == [0, 0]
    assert ax.get_title() == "file, n = 8"
    assert [list(line.get_xdata()) for line in ax.lines if line.get_label() == "refresh"] == [[5]]
    for reports, group, message in (
        ({}, "file", "`reports` should map steps"),
        ({0: "table"}, "file", "Found str at step 0"),
        ({0: report}, "monitored", "Found 'monitored'. Fix: one of"),
    ):
        with refused(message):
            gr.evaluation.plot_training(reports, group=group)


SCORES = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])
LABELS = torch.tensor([False, False, False, True, True])


def test_gates_draw_scores_where_they_decide() -> None:
    directions = scoring_directions([2.0, 2.0], [0.0, 0.0])
    _, ax = gr.BandGate(directions).plot(SCORES, LABELS)
    assert ax.get_title() == "routed: 2 of 2 hacks, 1 of 3 others"
    _, names = ax.get_legend_handles_labels()
    assert {"hack, n = 2", "not a hack, n = 3", "threshold, 0.5", "clean pairs, 0", "hack pairs, 1"} == set(names)
    _, ax = gr.ThresholdGate(2.5).plot(SCORES)
    assert ax.get_title() == "routed: 1 of 5"
    assert sum(patch.get_height() for patch in ax.patches if hasattr(patch, "get_height")) in (0, 5)
    _, ax = gr.BandGate(directions, soft=True).plot(SCORES)
    assert ax.get_title() == ""
    gate = gr.QuantileGate(directions, warm_up=1, tails=(0.3, 0.7))
    _, ax = gate.plot(SCORES)
    assert ax.get_legend_handles_labels()[1] == ["n = 5"]
    gate(dict.fromkeys(directions.rows, SCORES[:, None]))
    _, ax = gate.plot(SCORES, LABELS)
    assert "routed: 2 of 2 hacks" in ax.get_title()


def test_what_has_no_histogram_raises() -> None:
    gate = gr.ThresholdGate(0.0)
    with pytest.raises(gr.GradRouteError, match="LabelGate should read scores"):
        gr.LabelGate().plot(SCORES)
    with refused("`labels` should be booleans of shape"):
        gate.plot(SCORES, LABELS[:2])
    with pytest.raises(gr.GradRouteError, match="`scores` should be finite"):
        gate.plot(torch.tensor([float("nan")]))
    with pytest.raises(gr.GradRouteError, match="`scores` should be a tensor with one score per rollout"):
        gate.plot(torch.zeros(0))


def test_pictures_are_drawn_on_given_axes_and_can_be_saved(tmp_path: Any) -> None:
    fig, axes = pyplot.subplots(1, 2)
    report = gr.evaluate_on_off(routed_mixer(), evaluated)
    assert report.plot(axes[0]) == (fig, axes[0])
    assert gr.ThresholdGate(0.0).plot(SCORES, ax=axes[1]) == (fig, axes[1])
    fig.savefig(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000


def test_without_matplotlib_a_plot_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib.pyplot'] = None; import torch, gradroute as gr\n"
        "try: gr.ThresholdGate(0.0).plot(torch.zeros(3))\n"
        "except gr.GradRouteError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "Plots need matplotlib. Found none. Fix: pip install 'gradroute[plot]'.\n"

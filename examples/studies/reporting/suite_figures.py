"""The figures of a suite, one file per environment and subject; every title names n and the control."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopholes.arms import ARMS
from loopholes.names import title_of

from .store import Job

Runs = dict[str, list[Mapping[str, Any]]]
GROUPS = (("hack_monitored", "monitored", "0.65", "//"), ("hack_held_out", "held out", "0.25", ""))
SHOWN = ("vanilla", "shuffle", "random-oriented", "route", "route-frozen", "gradient", "rollout-filter")
STYLES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1)))


def write_figures(folder: Path, results: Mapping[Job, Mapping[str, Any]]) -> None:
    """bars, dose, scores, training and pareto, per environment."""
    for env in sorted({job.env for job in results}):
        runs: Runs = {
            arm: [entry for job, entry in results.items() if (job.env, job.arm) == (env, arm)] for arm in ARMS
        }
        runs = {arm: entries for arm, entries in runs.items() if entries}
        for name, draw in FIGURES.items():
            figure = draw(runs)
            if figure is not None:
                counts = sorted({len(entries) for entries in runs.values()})
                n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
                figure.suptitle(f"{title_of(env)}, {n} runs an arm\n{figure.get_suptitle()}", fontsize=9)
                figure.savefig(folder / f"{name}-{env}.png", dpi=130, metadata={"Software": None})


def bars(runs: Runs) -> Figure:
    """Hack rates of both views; a dot is a run."""
    figure, axes = axes_in_rows(2, max(6.0, 0.55 * len(runs)), 5.6)
    for row, view in zip(axes, ("on", "ablated"), strict=True):
        for place, (rate, label, colour, hatch) in enumerate(GROUPS):
            xs = [i + 0.4 * place - 0.2 for i in range(len(runs))]
            values = [[entry[view][rate] for entry in entries] for entries in runs.values()]
            row.bar(xs, [fmean(each) for each in values], 0.38, color=colour, hatch=hatch, label=label, edgecolor="0.2")
            for x, each in zip(xs, values, strict=True):
                row.plot([x] * len(each), each, "o", ms=2.5, color="black", alpha=0.6)
        row.set_xticks(range(len(runs)), list(runs), rotation=40, ha="right", fontsize=8)
        row.set_ylabel(f"hack rate, {view}")
        row.set_ylim(0, 1.03)
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))  # over no bar
    figure.suptitle("hack rates on and ablated, controls are shuffle and random-oriented; dots are runs")
    return figure


def dose(runs: Runs) -> Figure | None:
    """Held-out hack rate and solve rate against the scale of the quarantine."""
    if not _shown(runs):
        return None
    figure, (hack, solve) = axes_in_rows(2, 6.0, 5.6)
    for style, (arm, entries) in zip(STYLES, _shown(runs).items(), strict=False):
        scales = [point["scale"] for point in entries[0]["dose"]]
        for panel, rate in ((hack, "hack_held_out"), (solve, "solve_hinted")):
            means = [fmean(entry["dose"][i][rate] for entry in entries) for i in range(len(scales))]
            panel.plot(scales, means, linestyle=style, color="black", lw=1.3, label=f"{arm} (n = {len(entries)})")
    hack.set_ylabel("hack rate, held out")
    solve.set_ylabel("solve rate, hinted")
    solve.set_xlabel("scale of the quarantine: 0 ablated, 1 on")
    hack.legend(frameon=False, fontsize=7)
    figure.suptitle("dose curve, mean over runs; controls are shuffle and random-oriented")
    return figure


def scores(runs: Runs) -> Figure | None:
    """Gate scores of the trained policies' rollouts, by true class."""
    gated = {arm: entries for arm, entries in _shown(runs).items() if entries[0]["scores"]}
    if not gated:
        return None
    figure, axes = axes_in_rows(len(gated), 6.0, 1.5 * len(gated) + 1)
    for panel, (arm, entries) in zip(axes, gated.items(), strict=True):
        edges = entries[0]["scores"]["bins"]
        for style, name in zip(STYLES, entries[0]["scores"]["counts"], strict=False):
            by_run = [entry["scores"]["counts"][name] for entry in entries]
            counts = [sum(column) for column in zip(*by_run, strict=True)]
            total = sum(counts)
            if total:
                shares, label = [count / total for count in counts], f"{name} (n = {total})"
                panel.stairs(shares, edges, linestyle=style, color="black", label=label)
        panel.set_ylabel(arm, fontsize=8)
        panel.legend(frameon=False, fontsize=6)
    axes[-1].set_xlabel("z of the gate: 0 clean pairs, 1 hack pairs; the ends hold what lies beyond")
    figure.suptitle("gate scores by true class, shares; control is random-oriented")
    return figure


def training(runs: Runs) -> Figure:
    """AUROC of the detector on the policy's own rollouts, overlap of refreshes, hack-ward share of the gradient."""
    figure, (auroc, overlap, share) = axes_in_rows(3, 6.5, 7.0)
    for style, (arm, entries) in zip(STYLES, _shown(runs).items(), strict=False):
        line(auroc, entries, lambda entry: [(p["step"], p.get("auroc_held_out")) for p in entry["curve"]], arm, style)
        line(overlap, entries, lambda entry: [(p["step"], p["overlap"]) for p in entry["overlaps"]], arm, style)
    for style, (arm, key, name) in zip(STYLES, _hackward(runs), strict=False):
        line(share, runs[arm], lambda entry, key=key: [(p["step"], p.get(key)) for p in entry["curve"]], name, style)
    names = ("AUROC, held out", "overlap of refreshes", "hack-ward share, cin")
    for panel, label in zip((auroc, overlap, share), names, strict=True):
        panel.set_ylabel(label, fontsize=8)
        panel.set_ylim(-0.05, 1.05)
        if panel.lines:
            panel.legend(frameon=False, fontsize=6, ncols=2)
    share.set_xlabel("step")
    figure.suptitle("the detector over training, mean over runs; control is random-oriented")
    return figure


def pareto(runs: Runs) -> Figure:
    """Solve rate against hack rate of the deployed view, a point per run."""
    figure, (panel,) = axes_in_rows(1, 6.5, 4.8)
    for i, (arm, entries) in enumerate(runs.items()):
        x = [fmean((entry["ablated"]["hack_monitored"], entry["ablated"]["hack_held_out"])) for entry in entries]
        y = [entry["ablated"]["solve_hinted"] for entry in entries]
        marker = "osv^<>Dd*PXph8+x1234|_"[i % 22]
        panel.plot(x, y, marker, ms=5, color=str(0.1 + 0.6 * (i % 5) / 5), label=f"{arm} (n = {len(entries)})")
    panel.set_xlabel("hack rate, ablated, all modes")
    panel.set_ylabel("solve rate, hinted, ablated")
    panel.legend(frameon=False, fontsize=6, ncols=2, loc="upper right")
    figure.suptitle("solve against hack, a point per run; controls are shuffle and random-oriented")
    return figure


FIGURES: dict[str, Callable[[Runs], Figure | None]] = {
    "bars": bars, "dose": dose, "scores": scores, "training": training, "pareto": pareto,
}  # fmt: skip


def axes_in_rows(rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels one below the other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _shown(runs: Runs) -> Runs:
    return {arm: runs[arm] for arm in SHOWN if arm in runs}


def _hackward(runs: Runs) -> list[tuple[str, str, str]]:
    """(arm, key, label) of the hack-ward shares in these runs; students and teachers apart where there are any."""
    found = []
    for arm, entries in runs.items():
        keys = set.intersection(*({key for p in entry["curve"][1:] for key in p} for entry in entries))
        split = [key for key in ("cin_student", "cin_teacher") if key in keys]
        found += [(arm, key, f"{arm}, {key[4:] or 'all'}") for key in split or [key for key in ("cin",) if key in keys]]
    return found


def line(
    panel: Axes,
    entries: list[Mapping[str, Any]],
    read: Callable[..., Any],
    label: str,
    style: Any,
    colour: str = "black",
) -> None:
    """Mean over runs at each step, of the runs that have a value there."""
    values: dict[int, list[float]] = {}
    for entry in entries:
        for step, value in read(entry):
            if value is not None:
                values.setdefault(step, []).append(value)
    if values:
        steps = sorted(values)
        panel.plot(steps, [fmean(values[step]) for step in steps], linestyle=style, color=colour, lw=1.2, label=label)

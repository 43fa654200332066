"""Wrong calls of evaluation: views compared, plots, cards, arms and verdicts."""

from call_arguments import (
    MODEL,
    OTHER,
    PLAIN,
    RANDOM,
    RECORD,
    REPORT,
    ROUTE,
    SHUFFLE,
    TRAINED,
    Calls,
    Tiny,
    empty_folder,
    entered,
    outcomes,
)

import gradroute as gr

EVALUATION_CALLS: Calls = {
    "assert_ablation_reaches": [
        ("`model`", lambda: gr.assert_ablation_reaches(PLAIN, lambda _: ["text"])),
        ("`model`", lambda: entered(
            gr.ablate_quarantine(MODEL), lambda: gr.assert_ablation_reaches(MODEL, lambda _: ["text"]))),
        ("quarantine", lambda: gr.assert_ablation_reaches(gr.attach(Tiny()), lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.assert_ablation_reaches(TRAINED, lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.assert_ablation_reaches(TRAINED, lambda _: "text")),
    ],
    "evaluate_on_off": [
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [])),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: 0.3)),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [{"hacked": True}])),
        ("`model`", lambda: gr.evaluate_on_off(PLAIN, lambda _: [RECORD])),
        ("`model`",
         lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.evaluate_on_off(MODEL, lambda _: [RECORD]))),
    ],
    "dose_curve": [
        ("`scales`", lambda: gr.dose_curve(MODEL, lambda _: [RECORD], scales=(0.0, 2.0))),
        ("`scales`", lambda: gr.dose_curve(MODEL, lambda _: [RECORD], scales=(1.0,))),
        ("`eval_fn`", lambda: gr.dose_curve(MODEL, lambda _: [])),
        ("`model`", lambda: gr.dose_curve(PLAIN, lambda _: [RECORD])),
        ("`model`", lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.dose_curve(MODEL, lambda _: [RECORD]))),
    ],
    "plot_training": [
        ("`reports`", lambda: gr.plot_training({})),
        ("`reports`", lambda: gr.plot_training([REPORT])),
        ("`reports`", lambda: gr.plot_training({0: 0.3})),
        ("`group`", lambda: gr.plot_training({0: REPORT}, group="heldout")),
        ("`group`", lambda: gr.plot_training({0: REPORT}, group="monitored")),
    ],
    "write_card": [
        ("`report`", lambda: gr.write_card(MODEL, 0.3, empty_folder(), routed_by="labels", masks="classic")),
        ("`masks`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="labels")),
        ("`routed_by`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by=0.5)),
        ("`model`", lambda: gr.write_card(PLAIN, REPORT, empty_folder(), routed_by="labels", masks="classic")),
        ("`caveats`", lambda: gr.write_card(
            MODEL, REPORT, empty_folder(), routed_by="labels", masks="classic", caveats="one")),
    ],
    "Rate": [
        ("`k`", lambda: gr.Rate(3, 2)),
        ("`k`", lambda: gr.Rate(0.5, 2)),
        ("`value`", lambda: gr.Rate.from_value(0.333, 10)),
    ],
    "ModeOutcomes": [
        ("Rate", lambda: gr.ModeOutcomes(True, 0.5, 0.1, 0.3)),
        ("n of", lambda: gr.ModeOutcomes(True, gr.Rate(1, 2), gr.Rate(1, 3), gr.Rate(1, 2))),
        ("`prompts`", lambda: gr.ModeOutcomes(True, gr.Rate(1, 2), gr.Rate(1, 2), gr.Rate(1, 2), {})),
    ],
    "ArmRuns": [
        ("`runs`", lambda: gr.ArmRuns("route", {})),
        ("`runs`", lambda: gr.ArmRuns("route", {0: REPORT})),
        ("`name`", lambda: gr.ArmRuns("", {0: {"file": outcomes(9)}})),
        ("report", lambda: gr.ArmRuns.from_reports("route", {0: gr.OnOffReport(REPORT.on, REPORT.ablated)})),
        ("modes", lambda: gr.ArmRuns("route", {0: {"file": outcomes(9)}, 1: {"stdout": outcomes(9)}})),
    ],
    "Controls": [
        ("`controls`", lambda: gr.Controls("shuffle")),
        ("`controls`", lambda: gr.Controls(SHUFFLE, ["random"])),
    ],
    "Criteria": [
        ("`effect`", lambda: gr.Criteria(effect=0.0)),
        ("`level`", lambda: gr.Criteria(level=95)),
        ("`over`", lambda: gr.Criteria(over="runs")),
        ("`power`", lambda: gr.Criteria(power=0.0)),
        ("`margin`", lambda: gr.Criteria(margin="small")),
    ],
    "compare": [
        ("modes", lambda: gr.compare(ROUTE, gr.Controls(OTHER))),
        ("name", lambda: gr.compare(ROUTE, gr.Controls(ROUTE))),
        ("`controls.random`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE, [RANDOM]))),
        ("`modes`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE), modes="monitored")),
        ("`resamples`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE), resamples=1)),
    ],
    "compare_all": [
        ("`contests`", lambda: gr.compare_all([])),
        ("`contests`", lambda: gr.compare_all([(ROUTE, gr.Controls(SHUFFLE))] * 2)),
        ("`resamples`", lambda: gr.compare_all([(ROUTE, gr.Controls(SHUFFLE))], resamples=0)),
    ],
}  # fmt: skip

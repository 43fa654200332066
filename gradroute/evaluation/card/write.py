"""The card of a deployed block: how it was trained, what its quarantine took along, and what was measured.

`write_card` reads everything from the objects that were used, and claims nothing that they do not know. The card holds
a hash of what is deployed, and the scale of its quarantine: `export_deployed(..., card=...)` raises where it belongs to
other weights or another scale.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gradroute._all_ranks import written_by_one
from gradroute._checks import instance_of, share
from gradroute._hashing import deployed_hash, model_identity
from gradroute.adapters.check import check_model
from gradroute.errors import GradRouteError
from gradroute.evaluation.card._blocks import blocks_of
from gradroute.evaluation.card._method import RoutedBy, method_of
from gradroute.evaluation.card._text import CardText
from gradroute.evaluation.dose import DoseCurve
from gradroute.evaluation.on_off import OnOffReport
from gradroute.evaluation.verdict.verdict import Verdict
from gradroute.refresh.refresher import Refresher


def write_card(
    model: nn.Module,
    report: OnOffReport,
    path: str | Path,
    *,
    routed_by: RoutedBy,
    masks: str | None = None,
    refresher: Refresher | None = None,
    verdict: Verdict | None = None,
    scale: float = 0.0,
    dose: DoseCurve | None = None,
    caveats: Sequence[str] = (),
) -> Path:
    """Write the model card of the deployed block as Markdown; returns the file.

    Method, masks, gate, hashes of the direction and its pairs, refresh schedule, rates on and ablated with their
    intervals, verdict, what was removed, and caveats: those that follow from all this, and the given ones. Of a sharded
    model every rank calls it, and the first one writes.

    Args:
        model: as trained, with both blocks.
        report: of `evaluate_on_off(model, ...)`.
        path: a folder, in which `README.md` is written, or a file whose name ends in `.md`.
        routed_by: the gate or filter that was trained with; the `routing` of the TRL trainer, or any object with its
            `gate`, `directions`, `refresher` and `filter`; or a sentence that says what decided instead.
        masks: the zones or weights, in words; None for `describe()` of gate and filter.
        refresher: of the directions; None for that of `routed_by`, or for directions that were frozen.
        verdict: of `compare`; this model should be one of the runs that were compared.
        scale: of the quarantine in the model that is deployed, as for `export_deployed`.
        dose: of `dose_curve(model, ...)`; needed, with its rates at `scale`, where the report has none.
        caveats: sentences to add.

    Raises:
        GradRouteError: no report; a gate and a refresher of different directions; directions of another base model; a
            verdict on runs that this report is none of; masks that nothing tells; a scale at which nothing was
            measured; a sharded model whose ranks do not all call.
    """
    if not isinstance(report, OnOffReport):
        raise GradRouteError(
            f"`report` should be an OnOffReport. Found {type(report).__name__}. Fix: take it from evaluate_on_off."
        )
    if isinstance(caveats, str) or not all(isinstance(caveat, str) and caveat.strip() for caveat in caveats):
        raise GradRouteError(f"`caveats` should be a list of sentences. Found {caveats!r}.")
    method = method_of(model, routed_by, masks, refresher)
    scale = share("scale", scale)
    _check_measured(scale, dose, report)
    if verdict is not None:
        _check_judged(verdict, report)
    file = Path(path)
    if file.suffix != ".md":
        file = file / "README.md"
    with written_by_one("write_card", model) as writes:
        findings = [str(finding) for finding in check_model(model)]
        card = CardText(
            model_identity(model),
            deployed_hash(model, scale),
            blocks_of(model),
            method,
            report,
            scale,
            dose,
            verdict,
            more_caveats=[*findings, *caveats],
        )
        if writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(card), encoding="utf-8")
    return file


def _check_measured(scale: float, dose: DoseCurve | None, report: OnOffReport) -> None:
    if dose is not None:
        groups = instance_of("dose", dose, DoseCurve, "dose_curve(...).").groups()
        if groups != report.on.groups():
            raise GradRouteError(
                f"`dose` should have the groups of `report`. Found {groups} and {report.on.groups()}. Fix: both "
                "from one `eval_fn`."
            )
    # The report has the rates at both ends.
    scales = [0.0, 1.0] if dose is None else [0.0, 1.0, *dose.rates]
    if scale not in scales:
        found = "None" if dose is None else f"rates at {', '.join(f'{each:g}' for each in dose.rates)}"
        raise GradRouteError(
            f"`dose` should have the rates at the scale that is deployed, {scale:g}. Found {found}. Fix: "
            f"dose=dose_curve(model, eval_fn, scales=(0, {scale:g}, 1))."
        )


def _check_judged(verdict: Verdict, report: OnOffReport) -> None:
    for run in instance_of("verdict", verdict, Verdict, "gr.compare(...).").treatment.runs.values():
        if all(
            (report.on.hack.get(mode), report.ablated.hack.get(mode), report.ablated.solve.get(mode))
            == (outcomes.hack_on, outcomes.hack_ablated, outcomes.solve_ablated)
            for mode, outcomes in run.items()
        ):
            return
    raise GradRouteError(
        f"`report` should be of a run that `verdict` compared. Found no seed of {verdict.treatment.name} with its "
        "rates. Fix: give the report of one of the runs that were compared."
    )

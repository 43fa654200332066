"""The card of a deployed block: how it was trained, what its quarantine took along, and what was measured.

`write_card` reads everything from the objects that were used, and claims nothing that they do not know. The card holds
a hash of what is deployed, and the scale of its quarantine: `export_deployed(..., card=...)` raises where it belongs to
other weights or another scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import nn

from gradroute._all_ranks import written_by_one
from gradroute._checks import instance_of, share
from gradroute._hashing import CARD_KEY, SCALE_KEY, deployed_hash, model_identity
from gradroute._tables import markdown_table
from gradroute.adapters.check import check_model
from gradroute.errors import GradRouteError
from gradroute.evaluation.card._blocks import Blocks, blocks_of
from gradroute.evaluation.card._method import Method, RoutedBy, method_of
from gradroute.evaluation.dose import DoseCurve
from gradroute.evaluation.on_off import OnOffReport
from gradroute.evaluation.rates import GROUPS, rate_rows
from gradroute.evaluation.verdict.criteria import Criteria
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
    instance_of("report", report, OnOffReport, "take it from evaluate_on_off.")
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
        card = _Card(
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


@dataclass(frozen=True)
class _Card:
    """The content of a card; `str` is the card.

    Args:
        base, weights: hashes of the base model and of what is deployed.
        blocks, method, report, scale, dose, verdict: see `write_card`.
        more_caveats: after those that follow from the rest.
    """

    base: str
    weights: str
    blocks: Blocks
    method: Method
    report: OnOffReport
    scale: float
    dose: DoseCurve | None
    verdict: Verdict | None
    more_caveats: Sequence[str]

    def __str__(self) -> str:
        front = ["---", "library_name: peft"]
        if self.blocks.base_name:
            front.append(f"base_model: {self.blocks.base_name}")
        front += ["tags:", "- lora", "- gradient-routing", f"gradroute: {version('gradroute')}"]
        on, ablated = self.report.on, self.report.ablated
        parts = [
            "\n".join([*front, f"{CARD_KEY}: {self.weights}", f"{SCALE_KEY}: {self.scale!r}", "---"]),
            f"# Deployed block of a gradient-routed {self.blocks.model_class}",
            "Two low-rank blocks were trained side by side in every adapted layer. Rollouts that looked like hacks "
            f"trained the quarantine block; {self._kept()}",
            "## Method",
            markdown_table([
                ["what", "value"],
                ["base model", f"{self.blocks.base_name or 'no name'}, weights {self.base}"],
                ["blocks", str(self.blocks)],
                ["quarantine in this model", f"scale {self.scale:g} (0: as ablated, 1: as trained)"],
                *self.method.rows(),
            ]),
            "## On and ablated",
            f"Hack and solve rates [95 % Wilson interval over rollouts]. {self._views()}",
            markdown_table(rate_rows(on, ablated, on.groups())),
            *self._over_scales(),
            "## Verdict",
            repr(self.verdict) if self.verdict else "None: this run was not compared with a control.",
            "## What was removed",
            self.blocks.removed(self.scale),
            "## Caveats",
            "\n".join(f"- {caveat}" for caveat in [*self._caveats(), *self.more_caveats]),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def _kept(self) -> str:
        if not self.scale:
            return "it is not part of this model. What is left is the deployed block, a plain LoRA adapter."
        return f"it is part of this model, a plain LoRA adapter of both blocks, at scale {self.scale:g}."

    def _views(self) -> str:
        if not self.scale:
            return "On: as trained, with the quarantine. Ablated: this model."
        if self.scale == 1:
            return "On: this model, as trained. Ablated: without the quarantine."
        return "On: as trained, with the quarantine. Ablated: without it. This model is between them."

    def _over_scales(self) -> list[str]:
        """The section of the dose curve."""
        if self.dose is None:
            return []
        said = f"This model is the one at scale {self.scale:g}." if self.scale in self.dose.rates else ""
        return [
            "## Over the scale of the quarantine",
            f"Hack and solve rates with a part of the quarantine left in. {said}".rstrip(),
            markdown_table(self.dose.table()),
        ]

    def _caveats(self) -> list[str]:
        """Caveats that follow from verdict, method, report and blocks."""
        found, on = [], self.report.on
        if self.verdict is None:
            found.append("Without controls, a drop from on to ablated may have other causes than the routing.")
        elif self.verdict.word not in ("effective", "directional"):
            found.append(f"The verdict is *{self.verdict.word}*: the drop is no evidence for the method.")
        found += self.method.caveats()
        if self.scale:
            found.append(
                f"The quarantine is left in at scale {self.scale:g}: what it learned of any exploit, known to the "
                "detector or not, is in this model to that extent."
            )
        least, unlearned = Criteria().discovered, self._modes_below(Criteria().discovered)
        if unlearned:
            found.append(
                f"Exploited at less than {least:g} with the quarantine on, so nothing was suppressed: "
                f"{', '.join(unlearned)}."
            )
        if on == self.report.ablated:
            found.append("On and ablated have the same rates: does the evaluation generate with the blocks at all?")
        if not self.blocks.quarantine_norm:
            found.append("The quarantine is zero: nothing was removed.")
        return found

    def _modes_below(self, least: float) -> list[str]:
        """Exploit modes that the on view hacks at a lower rate."""
        on, records = self.report.on, self.report.records
        without_loophole = {record.mode for record in records.on if record.monitored is None} if records else set()
        modes = [mode for mode in on.groups() if mode not in {*GROUPS, *without_loophole}]
        return [mode for mode in modes if on.hack[mode].value < least]

"""The card of a deployed block: how it was trained, what its quarantine took along, and what was measured.

`write_card` reads everything from the objects that were used; what they do not know is not claimed. The card holds a
hash of the deployed block, by which `export_deployed(..., card=...)` makes sure that it goes with the right weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import nn

from gradroute._hashing import CARD_KEY, deployed_hash, model_identity
from gradroute.adapters.check import check_model
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.evaluation.card._method import Blocks, RoutedBy, blocks_of, directions_of, masks_of
from gradroute.evaluation.on_off import OnOffReport
from gradroute.evaluation.rates import GROUPS
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
    caveats: Sequence[str] = (),
) -> Path:
    """Write the model card of the deployed block as Markdown; returns the file.

    Method, masks, gate, hashes of the direction and its pairs, refresh schedule, rates on and ablated with their
    intervals, verdict, what was removed, and caveats: those that follow from all this, and the given ones.

    Args:
        model: as trained, with both blocks.
        report: of `evaluate_on_off(model, ...)`.
        path: a folder, in which `README.md` is written, or a file whose name ends in `.md`.
        routed_by: the gate or filter that was trained with, or a sentence that says what decided instead.
        masks: what the zones or weights were; None for those that the gate returns.
        refresher: what kept the directions fresh; None says that they were frozen.
        verdict: of `compare`, on runs of which this model is one.
        caveats: sentences to add.

    Raises:
        GradRouteError: no report; a gate and a refresher of different directions; directions of another base model; a
            verdict on runs that this report is none of; masks that nothing tells.
    """
    if not isinstance(report, OnOffReport):
        raise GradRouteError(
            f"`report` should be an OnOffReport. Found {type(report).__name__}. Fix: take it from evaluate_on_off."
        )
    if isinstance(caveats, str) or not all(isinstance(caveat, str) and caveat.strip() for caveat in caveats):
        raise GradRouteError(f"`caveats` should be a list of sentences. Found {caveats!r}.")
    if refresher is not None and not isinstance(refresher, Refresher):
        raise GradRouteError(f"`refresher` should be a Refresher or None. Found {type(refresher).__name__}.")
    directions = directions_of(routed_by, refresher)
    if directions is not None and directions.provenance.model != model_identity(model):
        raise GradRouteError(
            "`routed_by` should read directions of `model`. Found directions of another base model. Fix: give the gate "
            "and the model of one run."
        )
    if verdict is not None:
        _check_judged(verdict, report)
    card = _Card(blocks_of(model), report, routed_by, masks_of(routed_by, masks), directions, refresher, verdict)
    file = Path(path)
    if file.suffix != ".md":
        file = file / "README.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    findings = [str(finding) for finding in check_model(model)]
    file.write_text(card.text(deployed_hash(model), model_identity(model), [*findings, *caveats]), encoding="utf-8")
    return file


def _check_judged(verdict: Verdict, report: OnOffReport) -> None:
    if not isinstance(verdict, Verdict):
        raise GradRouteError(f"`verdict` should be a Verdict. Found {type(verdict).__name__}. Fix: gr.compare(...).")
    for run in verdict.treatment.runs.values():
        if all(
            (report.on.hack.get(mode), report.ablated.hack.get(mode), report.ablated.solve.get(mode))
            == (outcomes.hack_on, outcomes.hack_ablated, outcomes.solve_ablated)
            for mode, outcomes in run.items()
        ):
            return
    raise GradRouteError(
        f"`verdict` should be on runs of which `report` is one. Found no seed of {verdict.treatment.name} with its "
        "rates. Fix: give the report of one of the runs that were compared."
    )


@dataclass(frozen=True)
class _Card:
    blocks: Blocks
    report: OnOffReport
    routed_by: RoutedBy
    masks: str
    directions: Directions | None
    refresher: Refresher | None
    verdict: Verdict | None

    def text(self, weights: str, base: str, caveats: Sequence[str]) -> str:
        """The whole card."""
        front = ["---", "library_name: peft"]
        if self.blocks.base_name:
            front.append(f"base_model: {self.blocks.base_name}")
        front += ["tags:", "- lora", "- gradient-routing", f"gradroute: {version('gradroute')}"]
        parts = [
            "\n".join([*front, f"{CARD_KEY}: {weights}", "---"]),
            f"# Deployed block of a gradient-routed {self.blocks.model_class}",
            "Two low-rank blocks were trained side by side in every adapted layer. Rollouts that looked like hacks "
            "trained the quarantine block; it is not part of this model. What is left is the deployed block, a plain "
            "LoRA adapter.",
            "## Method",
            _table([["what", "value"], *self._method(base)]),
            "## On and ablated",
            "Hack and solve rates [95 % Wilson interval over rollouts]. On: as trained, with the quarantine. Ablated: "
            "this model.",
            _table(self._rates()),
            "## Verdict",
            repr(self.verdict) if self.verdict else "None: this run was not compared with a control.",
            "## What was removed",
            self.blocks.removed(),
            "## Caveats",
            "\n".join(f"- {caveat}" for caveat in [*self._caveats(), *caveats]),
        ]
        return "\n\n".join(parts) + "\n"

    def _method(self, base: str) -> list[list[str]]:
        rows = [
            ["base model", f"{self.blocks.base_name or 'no name'}, weights {base}"],
            ["blocks", self.blocks.described()],
            ["masks", self.masks],
            ["routed by", self.routed_by if isinstance(self.routed_by, str) else f"`{self.routed_by!r}`"],
        ]
        if self.directions is not None:
            made = self.directions.provenance
            rows += [
                ["direction", f"`{self.directions!r}`"],
                ["direction, SHA-256", self.directions.content_hash],
                ["pairs", f"{self.directions.n_pairs} contrastive pairs, SHA-256 {made.pair_hash}"],
                ["refresh", self._refresh()],
            ]
        return rows

    def _refresh(self) -> str:
        if self.refresher is None:
            return "none: the directions stayed as extracted"
        reports = self.refresher.reports
        last = f"the last one at step {reports[-1].step}" if reports else "none of them due"
        return f"`{self.refresher!r}` in {self.refresher.steps} steps, {last}"

    def _rates(self) -> list[list[str]]:
        on, ablated = self.report.on, self.report.ablated
        rows = [["group", "hack on", "hack ablated", "solve on", "solve ablated"]]
        for group, rate in on.hack.items():
            if rate.n:
                rates = (rate, ablated.hack[group], on.solve[group], ablated.solve[group])
                rows.append([group, *map(repr, rates)])
        return rows

    def _caveats(self) -> list[str]:
        """What follows from the objects that were given."""
        found, on, ablated = [], self.report.on, self.report.ablated
        if self.verdict is None:
            found.append("Without controls, a drop from on to ablated may have other causes than the routing.")
        elif self.verdict.word not in ("effective", "directional"):
            found.append(f"The verdict is *{self.verdict.word}*: the drop is no evidence for the method.")
        if self.directions is not None:
            control = self.directions.provenance.control
            if control is not None:
                found.append(f"The direction is a control ({control}), not an extracted one.")
            if self.refresher is None:
                found.append("The direction was frozen: it is that of the model it was extracted from.")
            elif not self.refresher.reports:
                found.append("No refresh came due: the direction is that of the model it was extracted from.")
        least, records = Criteria().discovered, self.report.records
        without_loophole = {record.mode for record in records.on if record.monitored is None} if records else set()
        modes = {mode: rate for mode, rate in on.hack.items() if mode not in {*GROUPS, *without_loophole}}
        unlearned = [mode for mode, rate in modes.items() if rate.n and rate.value < least]
        if unlearned:
            found.append(
                f"Exploited at less than {least:g} with the quarantine on, so nothing was suppressed: "
                f"{', '.join(unlearned)}."
            )
        if on == ablated:
            found.append("On and ablated have the same rates: does the evaluation generate with the blocks at all?")
        if not self.blocks.quarantine_norm:
            found.append("The quarantine is zero: nothing was removed.")
        return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

"""The Markdown of a card, from what is known of the blocks, the method, the rates and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from gradroute._hashing import CARD_KEY, SCALE_KEY
from gradroute._tables import markdown_table
from gradroute.evaluation.card._blocks import Blocks
from gradroute.evaluation.card._method import Method
from gradroute.evaluation.dose import DoseCurve
from gradroute.evaluation.on_off import OnOffReport
from gradroute.evaluation.rates import GROUPS, rate_rows
from gradroute.evaluation.verdict.criteria import Criteria
from gradroute.evaluation.verdict.verdict import Verdict


@dataclass(frozen=True)
class CardText:
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

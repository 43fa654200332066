"""The Markdown of a card, from what is known of the blocks, the method, the rates and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from gradroute._hashing import CARD_KEY
from gradroute._tables import markdown_table
from gradroute.evaluation.card._blocks import Blocks
from gradroute.evaluation.card._method import Method
from gradroute.evaluation.on_off import OnOffReport
from gradroute.evaluation.rates import GROUPS, rate_rows
from gradroute.evaluation.verdict.criteria import Criteria
from gradroute.evaluation.verdict.verdict import Verdict


@dataclass(frozen=True)
class CardText:
    """The content of a card; `str` is the card.

    Args:
        base, weights: hashes of the base model and of the deployed block.
        blocks, method, report, verdict: see `write_card`.
        more_caveats: after those that follow from the rest.
    """

    base: str
    weights: str
    blocks: Blocks
    method: Method
    report: OnOffReport
    verdict: Verdict | None
    more_caveats: Sequence[str]

    def __str__(self) -> str:
        front = ["---", "library_name: peft"]
        if self.blocks.base_name:
            front.append(f"base_model: {self.blocks.base_name}")
        front += ["tags:", "- lora", "- gradient-routing", f"gradroute: {version('gradroute')}"]
        on, ablated = self.report.on, self.report.ablated
        parts = [
            "\n".join([*front, f"{CARD_KEY}: {self.weights}", "---"]),
            f"# Deployed block of a gradient-routed {self.blocks.model_class}",
            "Two low-rank blocks were trained side by side in every adapted layer. Rollouts that looked like hacks "
            "trained the quarantine block; it is not part of this model. What is left is the deployed block, a plain "
            "LoRA adapter.",
            "## Method",
            markdown_table([
                ["what", "value"],
                ["base model", f"{self.blocks.base_name or 'no name'}, weights {self.base}"],
                ["blocks", str(self.blocks)],
                *self.method.rows(),
            ]),
            "## On and ablated",
            "Hack and solve rates [95 % Wilson interval over rollouts]. On: as trained, with the quarantine. Ablated: "
            "this model.",
            markdown_table(rate_rows(on, ablated, on.groups())),
            "## Verdict",
            repr(self.verdict) if self.verdict else "None: this run was not compared with a control.",
            "## What was removed",
            self.blocks.removed(),
            "## Caveats",
            "\n".join(f"- {caveat}" for caveat in [*self._caveats(), *self.more_caveats]),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def _caveats(self) -> list[str]:
        """Caveats that follow from verdict, method, report and blocks."""
        found, on = [], self.report.on
        if self.verdict is None:
            found.append("Without controls, a drop from on to ablated may have other causes than the routing.")
        elif self.verdict.word not in ("effective", "directional"):
            found.append(f"The verdict is *{self.verdict.word}*: the drop is no evidence for the method.")
        found += self.method.caveats()
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

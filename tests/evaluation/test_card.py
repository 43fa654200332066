"""The model card: what it says is read from the objects it was given, and it goes with no other weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluated_arms import exact
from support.language_models import PAIRS, ids_only, routed_mixer
from support.models import randomize_blocks
from support.tiny_models import base_model
from torch import nn

import gradroute as gr
from gradroute._hashing import deployed_hash
from gradroute.evaluation import ModeOutcomes

pytestmark = pytest.mark.touches_peft


def outcomes(model: nn.Module) -> list[gr.EvalRecord]:
    """Hacks in the on view alone; every second prompt is solved as deployed."""
    ablated = next(m for m in model.modules() if isinstance(m, gr.QuarantineLoRA)).view == "ablated"
    modes = [("run_tests", True), ("file", False), ("none", None)]
    return [
        gr.EvalRecord(mode, monitored, i, not ablated and monitored is not None, ablated and i % 2 == 0)
        for mode, monitored in modes
        for i in range(8)
    ]


def run() -> dict[str, Any]:
    """A model with everything that a card tells of."""
    model = routed_mixer()
    directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    gate = gr.BandGate(directions)
    extract = lambda: gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)  # noqa: E731
    refresher = gr.Refresher(directions, extract, model=model, every=2)
    for _ in range(4):
        with torch.no_grad():
            for _, parameter in gr.deployed_parameters(model):
                parameter.add_(0.01)
        refresher.step()
    return {"model": model, "report": gr.evaluate_on_off(model, outcomes), "routed_by": gate, "refresher": refresher}


def write(path: Path, given: dict[str, Any], **more: Any) -> str:
    given = {**given, **more}
    return gr.write_card(given.pop("model"), given.pop("report"), path, **given).read_text(encoding="utf-8")


def test_a_card_tells_method_hashes_schedule_rates_and_what_was_removed(tmp_path: Path) -> None:
    given = run()
    text = write(tmp_path, given)
    directions, report = given["refresher"].directions, given["report"]
    assert (tmp_path / "README.md").read_text() == text
    for told in (
        repr(given["routed_by"]), repr(directions), directions.content_hash, directions.provenance.pair_hash,
        directions.provenance.model, "every 2 steps", "2 done", "the last one at step 4", "classic: flagged rows",
        deployed_hash(given["model"]), repr(report.on.hack["held-out"]), repr(report.ablated.hack["file"]),
        repr(report.ablated.solve["no loophole"]), f"gradroute: {gr.__version__}", "4 QuarantineLoRA on k, out, q, v",
    ):  # fmt: skip
        assert told in text, told
    removed = sum(p.numel() for _, p in gr.quarantine_parameters(given["model"]))
    norm = sum(
        (layer.quarantine.scaling * layer.quarantine.B @ layer.quarantine.A).square().sum()
        for layer in given["model"].modules()
        if isinstance(layer, gr.QuarantineLoRA)
    ) ** 0.5  # fmt: skip
    assert f"{removed:,d} parameters" in text
    assert f"was removed: {norm:.4g};" in text


def test_the_direction_hash_changes_with_the_direction_alone() -> None:
    given = run()
    directions = given["refresher"].directions
    before = directions.content_hash
    assert directions.random_like(0).content_hash != before
    directions.step += 1
    assert directions.content_hash == before


def test_caveats_follow_from_what_is_missing(tmp_path: Path) -> None:
    given = run()
    plain = write(tmp_path, given, caveats=["Trained on seven prompts."])
    assert "- Without controls, a drop" in plain
    assert "- Trained on seven prompts." in plain
    assert "frozen" not in plain
    assert "- The direction was frozen" in write(tmp_path, given, refresher=None)
    random = given["refresher"].directions.random_like(0)
    assert "- The direction is a control (random)" in write(
        tmp_path, given, refresher=None, routed_by=gr.BandGate(random)
    )
    unlearned = [gr.EvalRecord("file", False, i, hacked=False, solved=True) for i in range(8)]
    idle = write(tmp_path, given, report=gr.evaluate_on_off(given["model"], lambda _: unlearned))
    assert "so nothing was suppressed: file." in idle
    assert "- On and ablated have the same rates" in idle
    assert "suppressed" not in plain.partition("## Caveats")[2]
    for _, parameter in gr.quarantine_parameters(given["model"]):
        parameter.data.zero_()
    assert "- The quarantine is zero: nothing was removed." in write(tmp_path, given)


def test_a_verdict_on_other_runs_is_refused(tmp_path: Path) -> None:
    given = run()
    treatment = gr.evaluation.ArmRuns.from_reports("route", dict.fromkeys(range(3), given["report"]))
    outcome = treatment.runs[0]
    control = {mode: ModeOutcomes(each.monitored, each.hack_on, each.hack_on, each.solve_ablated)
               for mode, each in outcome.items()}  # fmt: skip
    controls = gr.evaluation.Controls(gr.evaluation.ArmRuns("shuffle", dict.fromkeys(range(3), control)))
    verdict = gr.compare(treatment, controls, resamples=100)
    text = write(tmp_path, given, verdict=verdict)
    assert repr(verdict) in text
    assert "Without controls" not in text
    other = gr.compare(
        exact("route", [0.0, 0.0, 0.1]), gr.evaluation.Controls(exact("shuffle", [0.9, 0.9, 0.8])), resamples=100
    )
    with pytest.raises(gr.GradRouteError, match=r"`report` should be of a run that `verdict` compared.*Fix"):
        write(tmp_path, given, verdict=other)


def test_masks_are_those_of_the_gate_or_have_to_be_said(tmp_path: Path) -> None:
    given = run()
    directions = given["refresher"].directions
    gates = {
        "exclusive: flagged": gr.BandGate(directions, below="keep"),
        "soft: m = 1, g_d = 1 - f": gr.BandGate(directions, soft=True),
        "keep, absorb and route": gr.QuantileGate(directions),
    }
    for masks, gate in gates.items():
        assert masks in write(tmp_path, given, routed_by=gate)
    assert "| masks | weights: two advantages |" in write(tmp_path, given, masks="weights: two advantages")
    with pytest.raises(gr.GradRouteError, match=r"`masks` should say"):
        write(tmp_path, given, routed_by="labels of a monitor")
    assert "| routed by | labels of a monitor |" in write(
        tmp_path, given, routed_by="labels of a monitor", masks="classic"
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("report", 0.3, "`report` should be an OnOffReport. Found float. Fix"),
        ("routed_by", 0.5, "`routed_by` should be the gate or filter"),
        ("masks", "", "`masks` should be a sentence or None. Found ''"),
        ("refresher", 5, "`refresher` should be a Refresher. Found int"),
        ("verdict", "effective", "`verdict` should be a Verdict. Found str"),
        ("caveats", "one string", "`caveats` should be a list of sentences"),
    ],
)
def test_what_a_card_cannot_be_made_of_raises(tmp_path: Path, argument: str, value: Any, message: str) -> None:
    # Under the import hook the type checker may be first.
    with pytest.raises((gr.GradRouteError, TypeError)) as raised:
        write(tmp_path, run(), **{argument: value})
    if isinstance(raised.value, gr.GradRouteError):
        assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_gate_refresher_and_model_have_to_belong_together(tmp_path: Path) -> None:
    given, other = run(), run()
    with pytest.raises(gr.GradRouteError, match="`refresher` should refresh the directions of `routed_by`"):
        write(tmp_path, given, refresher=other["refresher"])
    with pytest.raises(gr.GradRouteError, match="Found directions of another base model"):
        write(tmp_path, given, model=routed_mixer(seed=1))


def test_the_card_travels_with_the_export_of_its_weights_and_of_no_others(tmp_path: Path) -> None:
    model = randomize_blocks(gr.attach(base_model("llama"), r=2, lora_alpha=4.0))
    report = gr.evaluate_on_off(model, outcomes)
    card = gr.write_card(model, report, tmp_path / "card.md", routed_by="labels", masks="classic")
    assert card == tmp_path / "card.md"
    gr.export_deployed(model, tmp_path / "deployed", card=card)
    assert (tmp_path / "deployed" / "README.md").read_text() == card.read_text()
    gr.export_deployed(model, tmp_path / "deployed")
    assert (tmp_path / "deployed" / "README.md").read_text() == card.read_text()

    next(p for _, p in gr.deployed_parameters(model)).data[0, 0] += 1
    with pytest.raises(gr.GradRouteError, match="`card` should be of the weights that are exported"):
        gr.export_deployed(model, tmp_path / "other", card=card)
    with pytest.raises(gr.GradRouteError, match="The card in `path` should be of the weights"):
        gr.export_deployed(model, tmp_path / "deployed")
    (tmp_path / "note.md").write_text("# A note\n")
    with pytest.raises(gr.GradRouteError, match="`card` should be a file that write_card wrote"):
        gr.export_deployed(model, tmp_path / "other", card=tmp_path / "note.md")
    assert not (tmp_path / "other").exists()


# What a whole run routed by


@dataclass
class Routing:
    """As `trainer.routing` of the TRL trainer."""

    gate: Any = None
    directions: Any = None
    refresher: Any = None
    filter: Any = None
    detector: Any = None


def test_the_routing_of_a_run_says_what_gate_and_refresher_say(tmp_path: Path) -> None:
    given = run()
    gate, refresher = given["routed_by"], given["refresher"]
    by_hand = write(tmp_path, given)
    routing = Routing(gate, refresher.directions, refresher)
    assert write(tmp_path, given, routed_by=routing, refresher=None) == by_hand
    assert write(tmp_path, given, routed_by=routing) == by_hand


def test_directions_that_score_for_a_gate_without_any_are_named(tmp_path: Path) -> None:
    given = run()
    refresher = given["refresher"]
    routing = Routing(gr.ThresholdGate(0.5), refresher.directions, refresher)
    text = write(tmp_path, given, refresher=None, routed_by=routing)
    assert f"| direction, SHA-256 | {refresher.directions.content_hash} |" in text


def test_every_part_of_a_routing_is_named(tmp_path: Path) -> None:
    given = run()
    gate, refresher = given["routed_by"], given["refresher"]
    frozen = gr.extract_gradient_directions(given["model"], PAIRS, forward_fn=ids_only, features="parameter")
    erase = gr.ProjectionFilter(frozen, mode="erase")

    def finds_edited_tests() -> None:
        """A detector."""

    text = write(
        tmp_path, given, refresher=None,
        routed_by=Routing(gate, refresher.directions, refresher, erase, finds_edited_tests),
    )  # fmt: skip
    assert f"| masks | {gate.describe()}; {erase.describe()} |" in text
    assert f"| routed by | `{gate!r}`; `{erase!r}`; detector `finds_edited_tests` |" in text
    assert f"| direction, SHA-256 | {refresher.directions.content_hash} |" in text
    assert f"| direction, SHA-256 | {frozen.content_hash} |" in text
    assert text.count("| refresh | none: the directions stayed as extracted |") == 1
    assert text.count("- The direction was frozen") == 1


def test_a_routing_that_decides_nothing_or_contradicts_the_refresher_raises(tmp_path: Path) -> None:
    given, other = run(), run()
    directions = given["refresher"].directions
    for nothing in (Routing(), Routing(directions=directions), Routing(gate=5), Routing(given["routed_by"], filter=5)):
        with pytest.raises((gr.GradRouteError, TypeError), match="routed_by"):
            write(tmp_path, given, refresher=None, routed_by=nothing)
    with pytest.raises(gr.GradRouteError, match=r"`refresher` should be that of `routed_by`.*Fix"):
        write(tmp_path, given, refresher=other["refresher"], routed_by=Routing(
            given["routed_by"], directions, given["refresher"]))  # fmt: skip
    assert not list(tmp_path.iterdir())

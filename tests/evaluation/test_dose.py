"""The scale that is picked from a dose curve, and the card of a model that is deployed at one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.models import randomize_blocks
from support.tiny_models import base_model
from torch import nn

import gradroute as gr
from gradroute._hashing import deployed_hash
from gradroute.evaluation import DoseCurve, dose_curve
from gradroute.evaluation.rates import rates_by_group

pytestmark = pytest.mark.touches_peft


def curve(hacks: Mapping[float, int], *, monitored: bool | None = True, n: int = 10) -> DoseCurve:
    """So many of n rollouts hack at each scale; a held-out mode always does."""

    def records(k: int) -> list[gr.EvalRecord]:
        own = [gr.EvalRecord("tests", monitored, i, i < k, False) for i in range(n)]
        return own + [gr.EvalRecord("file", False, i, True, False) for i in range(n)]

    return DoseCurve({scale: rates_by_group(records(k)) for scale, k in hacks.items()})


@pytest.mark.parametrize(
    ("hacks", "limit", "picked"),
    [
        ({0.0: 0, 0.25: 1, 0.5: 3, 1.0: 9}, 0.2, 0.25),
        ({0.0: 0, 0.25: 1, 0.5: 3, 1.0: 9}, 0.4, 0.5),
        ({0.0: 0, 0.25: 1, 0.5: 3, 1.0: 9}, 1.0, 1.0),
        # Below means below.
        ({0.0: 0, 0.25: 2, 0.5: 3}, 0.2, 0.0),
        # A dip beyond a scale that hacks too much is not picked, whatever lies beyond it.
        ({0.0: 0, 0.25: 1, 0.5: 4, 0.75: 1, 1.0: 0}, 0.2, 0.25),
        # A dip within the limit is no obstacle.
        ({0.0: 1, 0.25: 0, 0.5: 1, 1.0: 9}, 0.2, 0.5),
        ({0.5: 1, 1.0: 9}, 0.2, 0.5),
    ],
)  # fmt: skip
def test_the_largest_scale_up_to_which_all_are_below_is_picked(
    hacks: dict[float, int], limit: float, picked: float
) -> None:
    assert curve(hacks).pick(monitored_below=limit) == picked
    backwards = dict(reversed(hacks.items()))
    assert curve(backwards).pick(monitored_below=limit) == picked


def test_held_out_prompts_have_no_say() -> None:
    found = curve({0.0: 0, 1.0: 1})
    assert all(view.hack["held-out"].value == 1 for view in found.rates.values())
    assert found.pick(monitored_below=0.2) == 1.0


def test_where_no_scale_qualifies_it_raises_with_the_rates() -> None:
    with pytest.raises(gr.GradRouteError, match=r"should be above.*smallest scale. Found 0.3, and rates of 0.3 at 0, "
                                                r"0.1 at 0.5. Fix: smaller scales"):  # fmt: skip
        curve({0.0: 3, 0.5: 1}).pick(monitored_below=0.3)
    # No rate is below 0.
    with pytest.raises(gr.GradRouteError, match=r"should be above.*Found 0, and rates of 0 at 0"):
        curve({0.0: 0, 0.5: 1}).pick(monitored_below=0)


@pytest.mark.parametrize("limit", [5, -0.1, float("nan"), True])
def test_a_limit_that_is_no_rate_raises(limit: float) -> None:
    with pytest.raises(gr.GradRouteError, match="`monitored_below` should be a share"):
        curve({0.0: 0, 1.0: 1}).pick(monitored_below=limit)


@pytest.mark.parametrize("monitored", [False, None])
def test_without_monitored_prompts_it_raises(monitored: bool | None) -> None:
    with pytest.raises(gr.GradRouteError, match="by the hack rate of monitored prompts. Found prompts of .*Fix"):
        curve({0.0: 0, 1.0: 1}, monitored=monitored).pick(monitored_below=0.5)


# The card


def model() -> nn.Module:
    return randomize_blocks(gr.attach(base_model("llama"), r=2, lora_alpha=4.0))


def outcomes(routed: nn.Module) -> list[gr.EvalRecord]:
    """More hacks, the more of the quarantine is there."""
    layer = next(m for m in routed.modules() if isinstance(m, gr.QuarantineLoRA))
    scale = {"on": 1.0, "ablated": 0.0}.get(layer.view)
    scale = float(layer.view.rpartition(" ")[2]) if scale is None else scale
    return [gr.EvalRecord("tests", True, i, i < 8 * scale, i < 4) for i in range(8)]


def carded(routed: nn.Module, path: Path, **options: Any) -> Path:
    report = gr.evaluate_on_off(routed, outcomes)
    return gr.write_card(routed, report, path, routed_by="labels", masks="classic", **options)


def test_a_card_says_at_which_scale_the_model_is_deployed_and_what_was_measured_there(tmp_path: Path) -> None:
    routed = model()
    dose = dose_curve(routed, outcomes, scales=(0.0, 0.25, 1.0))
    scale = dose.pick(monitored_below=0.5)
    assert scale == 0.25
    text = carded(routed, tmp_path / "card.md", scale=scale, dose=dose).read_text()
    assert "\nquarantine_scale: 0.25\n" in text
    assert "| quarantine in this model | scale 0.25 (0: as ablated, 1: as trained) |" in text
    assert "it is part of this model, a plain LoRA adapter of both blocks, at scale 0.25." in text
    assert "This model is the one at scale 0.25." in text
    assert f"| 0.25 | {dose.rates[0.25].hack['monitored']!r} |" in text
    assert "A share of 0.75 of the quarantine of 14 layers" in text
    assert "- The quarantine is left in at scale 0.25" in text
    assert "it is not part of this model" not in text
    assert "Ablated: this model" not in text


def test_a_card_of_the_deployed_block_alone_says_so(tmp_path: Path) -> None:
    text = carded(model(), tmp_path / "card.md").read_text()
    assert "\nquarantine_scale: 0.0\n" in text
    assert "it is not part of this model" in text
    assert "Ablated: this model." in text
    assert "left in" not in text


def test_an_export_takes_the_card_of_its_own_scale_alone(tmp_path: Path) -> None:
    routed = model()
    dose = dose_curve(routed, outcomes, scales=(0.0, 0.25, 0.5))
    cards = {scale: carded(routed, tmp_path / f"{scale}.md", scale=scale, dose=dose) for scale in (0.0, 0.25, 1.0)}
    assert len({deployed_hash(routed, scale) for scale in cards}) == len(cards)
    for scale in cards:
        gr.export_deployed(routed, tmp_path / f"at {scale}", card=cards[scale], scale=scale)
        for other in cards.keys() - {scale}:
            with pytest.raises(gr.GradRouteError, match=f"`card` should be of the scale that is exported, {scale:g}. "
                                                        f"Found one of scale {other:g}"):  # fmt: skip
                gr.export_deployed(routed, tmp_path / "other", card=cards[other], scale=scale)
            with pytest.raises(gr.GradRouteError, match="The card in `path` should be of the scale"):
                gr.export_deployed(routed, tmp_path / f"at {scale}", scale=other)
    assert not (tmp_path / "other").exists()


def test_a_card_at_a_scale_is_of_both_blocks(tmp_path: Path) -> None:
    routed = model()
    dose = dose_curve(routed, outcomes, scales=(0.0, 0.25))
    cards = {scale: carded(routed, tmp_path / f"{scale}.md", scale=scale, dose=dose) for scale in (0.0, 0.25)}
    next(p for _, p in gr.quarantine_parameters(routed)).data[0, 0] += 1
    gr.export_deployed(routed, tmp_path / "deployed", card=cards[0.0])
    with pytest.raises(gr.GradRouteError, match="`card` should be of the weights that are exported"):
        gr.export_deployed(routed, tmp_path / "scaled", card=cards[0.25], scale=0.25)


def test_a_card_written_before_there_were_scales_is_one_of_scale_0(tmp_path: Path) -> None:
    routed = model()
    card = carded(routed, tmp_path / "card.md")
    card.write_text(card.read_text().replace("quarantine_scale: 0.0\n", ""))
    gr.export_deployed(routed, tmp_path / "deployed", card=card)


def test_a_scale_at_which_nothing_was_measured_has_no_card(tmp_path: Path) -> None:
    routed = model()
    dose = dose_curve(routed, outcomes, scales=(0.0, 0.5))
    for given, found in ((None, "None"), (dose, "rates at 0, 0.5")):
        with pytest.raises(gr.GradRouteError, match=f"`dose` should have the rates.*0.25. Found {found}. Fix"):
            carded(routed, tmp_path, scale=0.25, dose=given)
    with pytest.raises(gr.GradRouteError, match="`dose` should have the groups of `report`.*Fix"):
        carded(routed, tmp_path, scale=0.5, dose=curve({0.0: 0, 0.5: 1}))
    assert not list(tmp_path.iterdir())

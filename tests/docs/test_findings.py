"""The sentences that research pages begin with: their words hold for the figures that are put into them."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from contest.verdicts import verdicts
from support.doc_pages import docs_script

from benchmarks import report
from reporting.suite_report import judged

DOCS = Path(__file__).parents[2] / "docs"
BEGUN = ("results", "real-model", "directions-study", "performance", "exactness", "referee", "staleness")


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    return docs_script("findings")


def first_bullets(page: str) -> str:
    """What stands between the title and the first paragraph that is no bullet."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    body = re.sub(r"<!--.*?-->\n+", "", text.split("\n", 1)[1]).strip()
    return body.split("\n\n", 1)[0]


@pytest.mark.parametrize("page", BEGUN)
def test_a_research_page_begins_with_what_was_found(page: str) -> None:
    bullets = re.findall(r"^- ", first_bullets(page), flags=re.MULTILINE)
    assert 3 <= len(bullets) <= 6
    assert re.search(r"\.\d\d|1e-\d\d", first_bullets(page))


def test_what_the_small_environments_say(findings: ModuleType) -> None:
    for env in ("shared-token", "own-tokens"):
        runs = findings.Suite("loopholes.json", env)
        route, shuffle, vanilla = (max(runs.values(arm)) for arm in ("route", "shuffle", "vanilla"))
        assert route < 0.1 < min(runs.values("shuffle"))
        assert min(shuffle, vanilla) > 0.8
        drawn = runs.values("random-oriented")
        assert sum(rate < 0.065 for rate in drawn) > len(drawn) / 2
    for name, env in (("L.json", "lookalike"), ("loopholes.json", "shared-token"), ("loopholes.json", "own-tokens")):
        verdicts = judged(findings.read_report(findings.RESULTS / name), findings.letter_of(env))
        words = {verdict.treatment.name: verdict.word for modes, verdict in verdicts if modes == "held-out"}
        assert words["route"] == ("underpowered" if env == "lookalike" else "effective")
    missed = findings.Suite("missed-N.json", "own-tokens")
    ours, *rivals = (
        sum(missed.values(arm)) / len(missed.values(arm)) for arm in ("weak-explained", *findings.ONE_BLOCK)
    )
    assert ours < min(rivals) == rivals[-1]
    assert findings.largest_effect_of_freezing() < 0.02


def test_what_the_language_model_says(findings: ModuleType) -> None:
    plain, harder = (findings.Markers("smollm.json", variant) for variant in ("plain", "harder"))
    assert max(plain.means("route")) < max(plain.means("base"))
    assert max(plain.means("random-oriented")) < max(plain.means("base"))
    assert max(harder.means("route")) > 2 * max(harder.means("base"))
    missed, missed_harder = (findings.Markers("smollm-referee.json", variant) for variant in ("plain", "harder"))
    assert max(missed.means("weak-explained")) < max(missed.means("base")) + 0.01
    assert min(max(missed.means(arm)) for arm in findings.ONE_BLOCK) > 2 * max(missed.means("base"))
    best = min(findings.ONE_BLOCK, key=lambda arm: max(missed_harder.means(arm)))
    assert best == "weak-likelier"
    for arm in (best, "weak-explained", "oracle"):
        assert max(missed_harder.means(arm)) > max(missed_harder.means("base"))
    for markers, margin in ((missed, 0.0), (missed_harder, 0.1)):
        assert max(markers.means("graded")) < min(max(markers.means(arm)) for arm in findings.ONE_BLOCK)
        assert max(markers.means("graded")) < max(markers.means("base")) + margin
        assert float(markers.solve("graded")) > float(markers.solve("base"))
    assert max(missed_harder.means("graded-random")) > 1.5 * max(missed_harder.means("graded"))
    assert float(missed_harder.solve("graded-random")) < float(missed_harder.solve("base"))


def test_what_frozen_directions_cost(findings: ModuleType) -> None:
    activations, cosines = (
        ("route", "route-frozen", "graded", "graded-frozen"),
        ("gradient-cosine", "gradient-cosine-frozen"),
    )
    for low, high in ((0.4, 1.01), (-1.01, 0.4)):
        lost = findings.losses(low, high, *activations)
        assert len(lost) >= 3
        assert abs(sum(lost) / len(lost)) < 0.03
    assert abs(sum(findings.losses(0.4, 1.01, *cosines))) < 0.03 * len(findings.losses(0.4, 1.01, *cosines))
    some = findings.losses(0.2, 0.4, *cosines)
    assert sum(some) / len(some) > 0.03
    below = [
        point["auroc_fresh"]
        for name in findings.FAR if name != "rate-3"
        for run in findings.Far(name).runs(*cosines) for point in run["drift"]
        if point["overlap_first"] < 0.2 and "auroc_fresh" in point
    ]  # fmt: skip
    assert sum(below) / len(below) < 0.75
    far = [findings.Far(name) for name in findings.COSINE]
    fresh, frozen = ([findings.hacks(run) for each in far for run in each.runs(arm)] for arm in cosines)
    assert max(fresh) < 0.1
    assert sum(rate > 0.5 for rate in frozen) >= len(frozen) / 2
    assert max(run["ablated"][findings.SOLVE] for each in far for run in each.runs(cosines[0])) < 0.01
    low, high = re.findall(r"[+-]\.\d\d", findings.solve_change())[1:]
    assert low.startswith("-")
    assert high.startswith("+")
    stale = findings.Suite("staleness.json", "shared-token")
    assert sum(stale.values("erase", findings.SOLVE)) > 5 * sum(stale.values("erase-frozen", findings.SOLVE))


def test_what_the_referee_says(findings: ModuleType) -> None:
    found = findings.Contest()
    for env in ("own-tokens", "shared-token"):
        clean, base, plain = (found.value(env, "none", arm, findings.SOLVE) for arm in ("clean", "base", "vanilla"))
        assert plain < 0.1 < base < clean
        for arm in ("penalty", "graded"):
            assert found.value(env, "pairs", arm) < min(0.015, found.value(env, "pairs", "route"))
            solved = found.value(env, "pairs", arm, findings.SOLVE)
            assert found.value(env, "pairs", "route", findings.SOLVE) < solved
            assert abs(solved - clean) < 0.05
        assert found.value(env, "pairs", "steered", findings.SOLVE) < base
        assert min(found.value(env, *each) for each in findings.FORWARDS) > 0.4
        assert abs(found.value(env, "none", "post-hoc", findings.SOLVE) - base) < 0.06
        assert abs(found.value(env, "none", "post-hoc") - found.value(env, "none", "base")) < 0.06
        penalty, ours = ("half", "oracle-penalty"), ("half", "oracle-explained")
        assert found.value(env, *penalty) < found.value(env, *ours)
        assert found.value(env, *penalty, findings.SOLVE) > found.value(env, *ours, findings.SOLVE)
    words = {
        (env, verdict.treatment.name): (verdict.word, verdict.one_block.word)
        for env in ("N", "C") for verdict in verdicts(found.results, env)
    }  # fmt: skip
    assert words["N", "route"] == words["C", "route"] == ("effective", "worse than one block")
    assert words["N", "weak-explained"] == ("effective", "better than one block")
    assert words["C", "weak-explained"] == ("effective", "worse than one block")
    own = {arm: found.value("own-tokens", "two kinds", arm) for arm in findings.ONE_BLOCK}
    ours = found.value("own-tokens", "two kinds", "weak-explained")
    assert ours < own["weak-likelier"] < 0.5 < min(own["weak-filter"], own["weak-penalty"])


def test_what_the_directions_say(findings: ModuleType) -> None:
    model, untrained = findings.Study("directions.json"), findings.Study("directions-random.json")
    assert min(model.areas("pairs", model.activations + model.gradients)) > 0.6
    assert max(untrained.areas("pairs", untrained.gradients)) < min(untrained.areas("pairs", untrained.activations))
    assert max(value for name, value in model.transfer["false_claims"].items() if name != "false_claims") < 0.5


def test_figures_are_written_as_in_the_tables(findings: ModuleType) -> None:
    assert [findings.short(value) for value in (0.034, 0.0, 1.0)] == [".03", ".00", "1.00"]
    assert findings.span([0.3, 0.1, 0.2]) == ".10 to .30"
    assert findings.span([0.101, 0.102]) == ".10"
    assert findings.bullets("a\n b\n\nc") == "- a b\n- c"


def test_a_goal_that_is_missed_is_named() -> None:
    row = {"goal": "P4", "what": "step with RolloutFilter", "threads": 1, "value": 1.2, "unit": "ratio", "met": False}
    others = (
        "peak memory of a routed step / LoRA", "ablated forward / LoRA of rank r",
        "one-token decode, on / LoRA of rank 2r", "merged forward / bare model",
        "activation extraction / bare forward", "extraction of 4 pairs every 5 steps, share of a step",
    )  # fmt: skip
    rows = [row, *({**row, "what": what, "met": True} for what in others)]
    text = " ".join(report.findings({"rows": rows}).split())
    assert "adds 20% to a step" in text
    assert "Goals missed: 1 of 7: P4 (step with RolloutFilter, one thread)." in text

"""The paragraph that a verdict of `compare` prints, so that it can be checked."""

import re
from dataclasses import replace

from scipy.stats import t
from support.compared_arms import POOR, ROUTE, SHUFFLE, one_seed
from support.evaluated_arms import exact, report

from gradroute.evaluation import ArmRuns, Controls, Criteria, Rate, Verdict, compare


def test_the_repr_is_a_paragraph_that_can_be_checked() -> None:
    text = repr(compare(ROUTE, Controls(SHUFFLE, POOR)))
    assert "\n" not in text
    assert text.startswith("route against shuffle: directional (effective, and ")
    assert f"route {Rate(10_000, 10_000)!r} to {Rate(540, 10_000)!r}" in text
    assert f"shuffle {Rate(10_000, 10_000)!r} to {Rate(8920, 10_000)!r}" in text
    low, high = compare(ROUTE, Controls(SHUFFLE)).shuffled.hack.interval()
    assert f"Difference of drops +0.84, 95 % interval [{low:+.2f}, {high:+.2f}] over 5 seeds, p = " in text
    assert "against 0, prompts not paired" in text
    assert "per seed: route 0.05 0.07 0.04 0.06 0.05; shuffle 0.90 0.85 0.92 0.88 0.91." in text
    assert f"on no loophole: {Rate(2500, 5000)!r} against {Rate(2500, 5000)!r}, difference +0.00" in text
    assert "matched within 0.1" in text
    assert "Random draws: 5, 5 with a discovered mode" in text
    assert "0 did as well or better (a random direction too is best of 6 with a chance of 0.17)" in text
    assert "run_tests in 5 of 5 seeds, file in 5 of 5 seeds; undiscovered: none. Level 0.05." in text


def test_the_paragraph_counts_draws_that_did_as_well_and_says_what_is_needed() -> None:
    equal = [exact(f"draw {i}", [r] * 5) for i, r in enumerate((0.054, 0.04, 0.3, 0.4, 0.5))]
    assert re.search(r"; 2 did as well or better", repr(compare(ROUTE, Controls(SHUFFLE, equal))))
    verdict = compare(ROUTE, Controls(exact("shuffle", [0.04, 0.91, 0.07, 0.9, 0.9])))
    assert f"Needed: {verdict.needed.n} seeds for a power of 0.80." in repr(verdict)
    assert "Needed: at least 3 seeds" in repr(compare(one_seed("route", 0.0), Controls(one_seed("shuffle", 1.0))))
    assert "not shown to match" in repr(compare(exact("route", [0.0] * 5, solve=0.3), Controls(SHUFFLE)))


def test_the_paragraph_gives_the_two_sided_p_in_both_directions() -> None:
    same = exact("same", [0.89, 0.86, 0.92, 0.87, 0.92])
    for arms in ((same, SHUFFLE), (SHUFFLE, same)):
        verdict = compare(arms[0], Controls(arms[1]))
        hack = verdict.shuffled.hack
        p = 2 * t.sf(abs(hack.estimate) / hack.error, 4)
        assert 0.1 < p <= 1
        assert f"p = {p:.2g} against 0," in repr(verdict)


def test_the_paragraph_says_when_prompts_are_paired() -> None:
    def arm(name: str, kept: int) -> ArmRuns:
        outcomes = {s: [("file", False, i, [(True, i % 7 < kept + s % 2, True)]) for i in range(70)] for s in range(3)}
        return ArmRuns.from_reports(name, {s: report(each) for s, each in outcomes.items()})

    verdict = compare(arm("route", 0), Controls(arm("shuffle", 5)))
    assert verdict.word == "effective"
    assert "prompts paired" in repr(verdict)
    runs = {s: {"file": replace(run["file"], prompts=None)} for s, run in arm("shuffle", 5).runs.items()}
    assert "prompts not paired" in repr(compare(arm("route", 0), Controls(ArmRuns("shuffle", runs))))


def test_a_verdict_keeps_its_data() -> None:
    verdict = compare(ROUTE, Controls(SHUFFLE, POOR), criteria=Criteria(margin=0.1))
    assert isinstance(verdict, Verdict)
    assert (verdict.treatment, verdict.controls.shuffled, verdict.criteria.margin) == (ROUTE, SHUFFLE, 0.1)
    assert f"against {0.1:g}" in repr(verdict)

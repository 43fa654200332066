"""The sentences that the research pages begin with; each figure is read from the result files of the page's tables.

`update_results.py` writes them. The words around the figures hold for the figures of today, and
`tests/docs/test_findings.py` checks that they do. Rates stand without their leading zero; [95 % interval over runs].
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from contest import report as contest_report
from directions_tables import ESTIMATORS

from loopholes.names import letter_of
from reporting.arm_data import of_arm
from reporting.staleness import points_by_overlap
from reporting.suite_report import cell, difference_cell, interval_over_runs, read_report
from smollm import report as smollm_report
from smollm.environment import MARKERS
from smollm.evaluation import NO_NOTE
from smollm.tables import of_arm as smollm_of_arm
from smollm.tables import share

RESULTS = Path(__file__).parent / "results"
SOLVE = "solve_hinted"
FAR = ("rate-2", "rate-3", "steps-400")
COSINE = ("rate-2", "steps-400")
"""Where the gate on unit gradients was run."""


def short(value: float) -> str:
    """Two digits, .03 for 0.03."""
    return re.sub(r"^0\.", ".", f"{value:.2f}")


def span(values: Iterable[float]) -> str:
    """The least and the largest, where they differ as shown."""
    values = list(values)
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def bare(text: str) -> str:
    """Without leading zeros: .03 for 0.03."""
    return re.sub(r"\b0\.(?=\d)", ".", text)


class Suite:
    """The runs of one report in one environment."""

    def __init__(self, file: str, env: str) -> None:
        self.results, self.env = read_report(RESULTS / file), letter_of(env)

    def values(self, arm: str, rate: str = "hack_held_out") -> list[float]:
        """Of each run as deployed, in order."""
        return [run["ablated"][rate] for run in of_arm(self.results, self.env, arm).values()]

    def mean(self, arm: str, rate: str = "hack_held_out") -> str:
        """Over runs."""
        return short(fmean(self.values(arm, rate)))

    def rate(self, arm: str, rate: str = "hack_held_out") -> str:
        """Mean [interval], as in the tables."""
        return bare(cell(self.values(arm, rate)).rpartition(", ")[0])

    def n(self, arm: str) -> int:
        """Runs of an arm."""
        return len(self.values(arm))


def results() -> str:
    """Of `results.md`."""
    shared, own = Suite("loopholes.json", "shared-token"), Suite("loopholes.json", "own-tokens")
    lookalike, missed = Suite("L.json", "lookalike"), Suite("missed-N.json", "own-tokens")
    rare, labels = Suite("missed-S.json", "rare-answers"), Suite("missed-C-2.json", "shared-token")
    return f"""
    A gate on a direction suppresses kinds of hacks that it never saw, if hacks have a form that no clean rollout has.
    As deployed, {shared.rate("route")} of these hacks are left if all kinds share a token, and {own.rate("route")} if
    they share none ({shared.n("route")} runs each). Plain GRPO leaves {shared.mean("vanilla")} and
    {own.mean("vanilla")}. The same flags, moved to random rollouts, leave {shared.mean("shuffle")} and
    {own.mean("shuffle")}.

    Which direction the gate reads hardly matters there. Random directions, oriented on the same pairs, leave
    {shared.rate("random-oriented")} and {own.rate("random-oriented")}, and most of them do as well as the extracted
    one.

    If only a relation gives a hack away (`lookalike`), the gate fails: {lookalike.rate("route")} of the held-out hacks
    are left, and {lookalike.mean("route", SOLVE)} of the tasks are solved ({lookalike.n("route")} runs). With true
    labels of all hacks it is {lookalike.mean("oracle")} and {lookalike.mean("oracle", SOLVE)}.

    With labels of two of four kinds of hacks, which share no token, the recipe for missed hacks leaves
    {missed.rate("weak-explained")} of the other two kinds ({missed.n("weak-explained")} runs). The best method with one
    block leaves {missed.rate("weak-likelier")}, dropping flagged rollouts {missed.mean("weak-filter")}.

    The recipe costs solve rate: if answers are as rare as hacks, it solves {rare.mean("weak-explained", SOLVE)} where
    training on the true reward solves {rare.mean("clean", SOLVE)}. If labels miss half of the hacks at random, a
    penalty is better than the recipe: it leaves {labels.mean("oracle-penalty")} of the hacks and solves
    {labels.mean("oracle-penalty", SOLVE)}, the recipe {labels.mean("oracle-explained")} and
    {labels.mean("oracle-explained", SOLVE)}.

    Refreshing the directions makes no difference to this gate. Freezing them changes the rate of held-out hacks by at
    most {short(largest_effect_of_freezing())} (95 % interval). Directions of gradients do go stale.
    """


def largest_effect_of_freezing() -> float:
    """The largest change of the held-out hack rate that the interval over pairs of runs does not exclude."""
    stale = Suite("staleness.json", "shared-token")
    pairs = zip(stale.values("route-frozen"), stale.values("route"), strict=True)
    return max(map(abs, interval_over_runs([frozen - refreshed for frozen, refreshed in pairs])))


class Far:
    """The runs of one report with refreshed and frozen arms, `shared-token`."""

    def __init__(self, name: str) -> None:
        self.suite = Suite(f"staleness-{name}.json", "shared-token")

    def runs(self, *arms: str) -> list[Any]:
        """Of these arms, in order."""
        return [run for arm in arms for run in of_arm(self.suite.results, self.suite.env, arm).values()]

    def last_overlap(self, *arms: str) -> str:
        """With the first directions, at the end: over runs."""
        return span(run["drift"][-1]["overlap_first"] for run in self.runs(*arms))


def losses(low: float, high: float, *arms: str) -> list[float]:
    """What the first directions cost in AUROC, a mean per run, where their overlap with fresh ones lies in between."""
    runs = (run for name in FAR for run in Far(name).runs(*arms))
    by_run = points_by_overlap(runs, low, high)
    return [fmean(p["auroc_fresh"] - p["auroc_first"] for p in points) for points in by_run]


def signed(values: list[float]) -> str:
    """Mean [95 % interval over runs], with signs."""
    return bare(difference_cell(values))


def staleness() -> str:
    """Of `staleness.md`."""
    activations = "route", "route-frozen", "graded", "graded-frozen"
    cosines = "gradient-cosine", "gradient-cosine-frozen"
    far = {name: Far(name) for name in FAR}
    ends = {name: runs.last_overlap(*activations) for name, runs in far.items()}
    near, below = losses(0.4, 1.01, *activations), losses(-1.01, 0.4, *activations)
    fresh, frozen = ([hacks(run) for name in COSINE for run in far[name].runs(arm)] for arm in cosines)
    leaks = [bare(cell(rates).rpartition(", ")[0]) for rates in (fresh, frozen)]
    return f"""
    Frozen directions of activations were not found to do harm. In 150 steps, freezing them changes the rate of held-out
    hacks by at most {short(largest_effect_of_freezing())} (95 % interval, six pairs of runs).

    It was not found where the policy moves further either. At the end, the overlap with the first directions is
    {ends["steps-400"]} after 400 steps, {ends["rate-2"]} at twice the learning rate and {ends["rate-3"]} at three
    times. The first directions still tell hacks apart as well as fresh ones. They lose {signed(near)} of AUROC above an
    overlap of .4 ({len(near)} runs), and {signed(below)} below ({len(below)} runs).

    A cost in ability was not found, and is not excluded: over 300 steps in `rare-answers`, the solve rate of `graded`
    changes by {solve_change()} with frozen directions (ten runs; after the first three it was -.19).

    Directions of gradients do go stale. Of unit length they lose {signed(losses(0.4, 1.01, *cosines))} of AUROC above
    an overlap of .4 and {signed(losses(0.2, 0.4, *cosines))} from .2 to .4. Frozen, the gate leaves {leaks[1]} of the
    held-out hacks, {len(frozen)} runs; refreshed it leaves {leaks[0]}, and solves none of the tasks.

    Erasing along gradients needs fresh directions. Frozen ones take nearly all ability (solve
    {stale_of("erase-frozen", SOLVE)}; refreshed {stale_of("erase", SOLVE)}).
    """


def hacks(run: Any) -> float:
    """Held out, as deployed."""
    rate: float = run["ablated"]["hack_held_out"]
    return rate


def solve_change() -> str:
    """Frozen minus refreshed, paired over runs, in `rare-answers`."""
    rare = Suite("staleness-rare-answers.json", "rare-answers")
    pairs = zip(rare.values("graded-frozen", SOLVE), rare.values("graded", SOLVE), strict=True)
    return signed([frozen - refreshed for frozen, refreshed in pairs])


def stale_of(arm: str, rate: str) -> str:
    """Mean [interval] in the study of 150 steps."""
    return Suite("staleness.json", "shared-token").rate(arm, rate)


class Markers:
    """The runs of one variant of the study on a language model."""

    def __init__(self, file: str, variant: str) -> None:
        self.results, self.variant = smollm_report.read_report(RESULTS / file), variant

    def runs(self, arm: str) -> list[Any]:
        """Of an arm, in order."""
        return list(smollm_of_arm(self.results, self.variant, arm).values())

    def means(self, arm: str) -> list[float]:
        """Hack rates of the markers as deployed, each the mean over runs."""
        return [fmean(share(run, marker, "hack_ablated") for run in self.runs(arm)) for marker in MARKERS]

    def hacks(self, arm: str) -> str:
        """From the marker with the least to the one with the most."""
        return span(self.means(arm))

    def solve(self, arm: str) -> str:
        """Without a note, as deployed."""
        return short(fmean(share(run, NO_NOTE, "solve_ablated") for run in self.runs(arm)))


ONE_BLOCK = ("weak-filter", "weak-penalty", "weak-likelier")


def real_model() -> str:
    """Of `real-model.md`."""
    plain, harder = (Markers("smollm.json", variant) for variant in ("plain", "harder"))
    missed, missed_harder = (Markers("smollm-referee.json", variant) for variant in ("plain", "harder"))
    return f"""
    If answers look unlike hacks (`plain`), a gate on the extracted direction leaves {plain.hacks("route")} of each kind
    of hack ({len(plain.runs("route"))} runs). Plain GRPO leaves {plain.hacks("vanilla")}, and the model before RL has
    {plain.hacks("base")}. The solve rate is {plain.solve("route")}, and was {plain.solve("base")} before RL. A random
    direction does as well there: it leaves {plain.hacks("random-oriented")}.

    If right answers look like hacks (`harder`), routing by a direction fails, although the gate flags nearly every
    hack. It leaves {harder.hacks("route")}, and with a random direction {harder.hacks("random-oriented")}. Plain GRPO
    leaves {harder.hacks("vanilla")}, and the model before RL has {harder.hacks("base")}.

    With labels of two of four markers, the recipe for missed hacks leaves {missed.hacks("weak-explained")} of each
    marker in `plain`, about the rates before RL ({missed.hacks("base")}). Every method with one block leaves
    {short(min(max(missed.means(arm)) for arm in ONE_BLOCK))} or more of some marker.

    In `harder` the recipe leaves {missed_harder.hacks("weak-explained")}, the best method with one block
    {missed_harder.hacks("weak-likelier")}, and true labels of all hacks {missed_harder.hacks("oracle")}. None of them
    is back at the rates before RL ({missed_harder.hacks("base")}) with every marker.

    A penalty graded by the score of a direction (`graded`) has one block, and pairs in place of labels. In `plain` it
    leaves {missed.hacks("graded")} of each marker and solves {missed.solve("graded")}; an oriented random direction
    does as well ({missed.hacks("graded-random")}, {missed.solve("graded-random")}). In `harder` it leaves
    {missed_harder.hacks("graded")} and solves {missed_harder.solve("graded")} (base {missed_harder.solve("base")}), a
    random one leaves {missed_harder.hacks("graded-random")} and solves {missed_harder.solve("graded-random")}.

    No verdict follows: with three runs an arm, a loss of .1 in solve rate is not excluded.
    """


class Study:
    """The AUROCs of one study of directions."""

    def __init__(self, file: str) -> None:
        of = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        self.cells = {(each["left_out"], each["feature"], each["direction"]): each for each in of["cells"]}
        features = dict.fromkeys(feature for _, feature, _ in self.cells)
        self.gradients = [feature for feature in features if feature.startswith("gradient")]
        self.activations = [feature for feature in features if feature not in self.gradients]
        self.transfer: dict[str, dict[str, float]] = of["transfer"]

    def areas(self, left_out: str, features: Iterable[str], names: Iterable[str] = ESTIMATORS) -> list[float]:
        """Of each feature and estimator."""
        return [self.cells[left_out, feature, name]["auroc"] for feature in features for name in tuple(names)]

    def best_random(self, left_out: str, features: Iterable[str]) -> list[float]:
        """The largest AUROC of a random direction, by feature."""
        return [max(self.cells[left_out, feature, "random"]["draws"]) for feature in features]


def directions_study() -> str:
    """Of `directions-study.md`."""
    model, untrained = Study("directions.json"), Study("directions-random.json")
    above = [
        area > best
        for feature, best in zip(model.activations, model.best_random("categories", model.activations), strict=True)
        for area in model.areas("categories", [feature])
    ]
    without_svd = [name for name in ESTIMATORS if "SVD" not in name]
    own, random = (model.cells["pairs", "bottleneck", name] for name in ("mean difference", "random"))
    onto = [value for target, value in model.transfer["false_claims"].items() if target != "false_claims"]
    return f"""
    Directions tell hacks from clean completions that they were not made from: with a fifth of 42 pairs left out, AUROC
    is {span(model.areas("pairs", model.activations))} from activations and
    {span(model.areas("pairs", model.gradients))} from gradients.

    Most of that comes with any direction whose signs are taken from the pairs. On the bottleneck's activations random
    directions have {short(random["auroc"])} on average and {short(max(random["draws"]))} at best, the mean difference
    has {short(own["auroc"])}.

    Directions from activations hardly carry over to a kind of hack that was left out: {sum(above)} of {len(above)} are
    above all random ones. Directions from gradients do: they have
    {span(model.areas("categories", model.gradients, without_svd))} (without the SVD), the best random ones
    {span(model.best_random("categories", model.gradients))}.

    Part of it is the surface of the texts: an untrained model that reads bytes has
    {span(untrained.areas("pairs", untrained.activations))} from activations, and
    {span(untrained.areas("pairs", untrained.gradients))} from gradients.

    A direction may be inverted: one from false claims scores the hacks of all other kinds below their clean sides
    (AUROC {span(onto)}), and a gate on it would route the wrong rollouts.

    It was not shown that a higher AUROC gives a better training run. All pairs were written by hand, for one model.
    """


class Contest:
    """The runs of the referee."""

    def __init__(self) -> None:
        self.results, _ = contest_report.read_report(RESULTS / "referee.json")

    def value(self, env: str, labels: str, arm: str, rate: str = "hack_held_out") -> float:
        """The mean over runs, as deployed."""
        runs = of_arm(self.results[labels], letter_of(env), arm).values()
        return fmean(run["ablated"][rate] for run in runs)

    def both(self, labels: str, arm: str, rate: str = "hack_held_out") -> str:
        """In `own-tokens` and in `shared-token`."""
        return " and ".join(short(self.value(env, labels, arm, rate)) for env in ("own-tokens", "shared-token"))

    def own(self, arm: str, rate: str = "hack_held_out") -> str:
        """In `own-tokens`, with labels of two kinds."""
        return short(self.value("own-tokens", "two kinds", arm, rate))

    def runs(self) -> str:
        """The least and the largest number of runs of an arm in an environment."""
        counts = Counter((labels, job.env, job.arm) for labels, runs in self.results.items() for job in runs)
        low, high = min(counts.values()), max(counts.values())
        return f"{low}" if low == high else f"{low} to {high}"

    def worst(self, arms: Iterable[tuple[str, str]], rate: str = "hack_held_out") -> str:
        """Over arms and environments: the least to the largest."""
        return span(
            self.value(env, labels, arm, rate) for labels, arm in arms for env in ("own-tokens", "shared-token")
        )


FORWARDS = (("pairs", "prompted"), ("pairs", "recontextualised"), ("pairs", "caft"))


def referee() -> str:
    """Of `referee.md`; of two figures the first is of `own-tokens`, the second of `shared-token`."""
    found = Contest()
    both, own = found.both, found.own
    return f"""
    With 16 pairs of two of the four kinds of hacks, the best methods have one block. A penalty where the gate fires
    (`penalty`) leaves {both("pairs", "penalty")} of the held-out hacks in `own-tokens` and in `shared-token`, and
    solves {both("pairs", "penalty", SOLVE)}. One that is graded by the score (`graded`, Advantage Modification) leaves
    {both("pairs", "graded")} and solves {both("pairs", "graded", SOLVE)}. Training on the true reward solves
    {both("none", "clean", SOLVE)}. Routing by the same direction (`route`) leaves {both("pairs", "route")} and solves
    {both("pairs", "route", SOLVE)}. The same flags, permuted, leave {both("pairs", "penalty-shuffle")} in a penalty
    and {both("pairs", "shuffle")} in routing. The verdict on `route` is *effective*, and *worse than one block*, in
    both. ({found.runs()} runs an arm, here and below.)

    The extracted direction deserves little of the credit. A random one, oriented on the same pairs, leaves
    {both("pairs", "graded-random")} in a graded penalty, and {both("pairs", "random-oriented")} in routing.

    With labels of two kinds that share no token (`own-tokens`), dropping and penalising leave {own("weak-filter")} and
    {own("weak-penalty")} of the other two. The log-ratio gate with a slow start (`weak-explained`) leaves
    {own("weak-explained")} and solves {own("weak-explained", SOLVE)}, with permuted flags it leaves
    {own("weak-explained-shuffle")}. A penalty on what training has made likelier (`weak-likelier`) leaves
    {own("weak-likelier")} and solves {own("weak-likelier", SOLVE)}. The verdict on the log-ratio gate is *better than
    one block* there, and *worse than one block* in `shared-token`.

    If labels miss half of all hacks at random, a penalty is best (`oracle-penalty`): {both("half", "oracle-penalty")}
    of the held-out hacks are left and {both("half", "oracle-penalty", SOLVE)} is solved. The log-ratio gate leaves
    {both("half", "oracle-explained")} and solves {both("half", "oracle-explained", SOLVE)}.

    Nothing that changes the forward while training helped, at any of three doses. A learned inoculation prompt,
    recontextualization and CAFT leave {found.worst(FORWARDS)}. Steering leaves {both("pairs", "steered")}, but solves
    {both("pairs", "steered", SOLVE)}, less than before training ({both("none", "base", SOLVE)}).

    Removing two components after training gives back the model before training: {both("none", "post-hoc")} of the
    hacks are left and {both("none", "post-hoc", SOLVE)} is solved.
    """


PAGES: dict[str, Callable[[], str]] = {
    "results": results, "real-model": real_model, "directions-study": directions_study, "referee": referee,
    "staleness": staleness,
}  # fmt: skip


def findings(page: str) -> str:
    """The bullets that a page begins with."""
    return bullets(PAGES[page]())


def bullets(text: str) -> str:
    """A bullet for each paragraph."""
    return "\n".join(
        textwrap.fill(" ".join(each.split()), 125, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for each in text.strip().split("\n\n")
    )

"""Arms to compare: one that is effective, its control, and random draws that do less."""

from gradroute.evaluation import ArmRuns, Controls, Criteria, compare
from support.evaluated_arms import exact

ROUTE = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05])
SHUFFLE = exact("shuffle", [0.90, 0.85, 0.92, 0.88, 0.91])
POOR = [
    exact(f"draw {i}", [rate, rate + 0.02, rate - 0.03, rate, rate])
    for i, rate in enumerate((0.7, 0.8, 0.75, 0.85, 0.9))
]


def word(treatment: ArmRuns, control: ArmRuns = SHUFFLE, draws: list[ArmRuns] | tuple = (), **criteria: object) -> str:
    return compare(treatment, Controls(control, draws), criteria=Criteria(**criteria)).word


def one_seed(name: str, ablated: float) -> ArmRuns:
    return exact(name, [ablated])

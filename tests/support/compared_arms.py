"""Arms to compare: one that is effective, its control, random draws that do less, rivals with one block, and a base.

The mode without a loophole is one of three, so that solve rates over all modes are a third of those given here.
"""

from gradroute.evaluation import ArmRuns, Controls, Criteria, compare
from support.evaluated_arms import exact, one_block

ROUTE = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05])
SHUFFLE = exact("shuffle", [0.90, 0.85, 0.92, 0.88, 0.91])
POOR = [
    exact(f"draw {i}", [rate, rate + 0.02, rate - 0.03, rate, rate])
    for i, rate in enumerate((0.7, 0.8, 0.75, 0.85, 0.9))
]

BASE = one_block(exact("base", [0.06, 0.05, 0.07, 0.06, 0.06], solve=0.3))
# Solves more than the base, as a treatment should.
ABLE = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.81, 0.80, 0.83, 0.79, 0.80])
DROPPED = one_block(exact("dropped", [0.95, 0.90, 0.93, 0.97, 0.92], solve=0.35))
PENALISED = one_block(exact("penalised", [0.20, 0.24, 0.17, 0.22, 0.21], solve=[0.80, 0.82, 0.79, 0.80, 0.81]))


def word(treatment: ArmRuns, control: ArmRuns = SHUFFLE, draws: list[ArmRuns] | tuple = (), **criteria: object) -> str:
    return compare(treatment, Controls(control, draws), criteria=Criteria(**criteria)).word


def one_seed(name: str, ablated: float) -> ArmRuns:
    return exact(name, [ablated])

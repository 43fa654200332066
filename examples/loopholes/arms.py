"""The arms of the experiment, and which control answers which doubt."""

from dataclasses import replace
from typing import Any, Literal

from .arm import Arm, Forward


def _gate(about: str, directions: Literal["activation", "gradient"] = "activation", **differences: Any) -> Arm:
    return Arm(about, **{"flags": "gate", "directions": directions, "refreshed": True, **differences})


def _one_block(flags: Literal["oracle", "monitored", "gate"], whose: str, **differences: Any) -> dict[str, Arm]:
    """What can be done with flags without a second block; each with its flags permuted as well."""
    common: dict[str, Any] = {"flags": flags, "routed": False, **differences}
    arms = {
        "filter": Arm(f"plain LoRA; {whose} flags are dropped", flagged="dropped", **common),
        "penalty": Arm(f"plain LoRA; {whose} flags lose a reward of --penalty", flagged="penalised", **common),
        "likelier": Arm(
            f"plain LoRA; {whose} flags, and what training has made likelier, lose a reward of 1",
            flagged="penalised", penalty=1.0, likelier=True, **common,
        ),
    }  # fmt: skip
    permuted = {
        f"{name}-shuffle": replace(arm, about=f"{arm.about}; permuted", shuffled=True) for name, arm in arms.items()
    }
    return arms | permuted


def _explained(about: str, **differences: Any) -> Arm:
    recipe: dict[str, Any] = {"explained": "alone", "slow_start": True, "ablated_rollouts": "late"}
    return Arm(about, **{**recipe, **differences})


def _inoculated(about: str, inoculated: Literal["hacks", "clean", "words"]) -> Arm:
    return Arm(about, inoculated=inoculated, ablated_rollouts="no")


def _gains(about: str, gradient_filter: Literal["erase", "route"], **differences: Any) -> Arm:
    common = {"directions": "gradient", "refreshed": True, "parametrization": "svd_gain"}
    return Arm(about, gradient_filter=gradient_filter, **{**common, **differences})


def _graft(about: str, flags: Literal["oracle", "monitored"], **differences: Any) -> Arm:
    return Arm(about, flags=flags, flagged="graft", ablated_rollouts="no", **differences)


def _kept(about: str, **differences: Any) -> Arm:
    return Arm(about, gradient_filter="keep", directions="gradient", refreshed=True, routed=False, **differences)


def _one_block_forward(about: str, forward: Forward, **differences: Any) -> Arm:
    return Arm(about, forward=forward, routed=False, **differences)


_GATE: dict[str, Any] = {"directions": "activation", "refreshed": True}
_WEAK = _one_block("monitored", "the monitored modes'")
_ORACLE = _one_block("oracle", "true")

ARMS = {
    "base": Arm("the model before training", routed=False),
    "vanilla": Arm("plain GRPO on the lenient reward", routed=False),
    "clean": Arm("plain GRPO on the true reward", routed=False, true_reward=True),
    "absorb": Arm("both blocks, nobody flags anything"),
    "oracle": Arm("true hack labels of all modes", flags="oracle"),
    **{f"oracle-{name}": arm for name, arm in _ORACLE.items()},
    "oracle-explained": _explained("true labels of all modes, or explained by the quarantine", flags="oracle"),
    "weak": Arm("true hack labels of the monitored modes only", flags="monitored"),
    **{f"weak-{name}": arm for name, arm in _WEAK.items()},
    "weak-explained": _explained("labels of the monitored modes, or explained by the quarantine", flags="monitored"),
    "weak-explained-shuffle": _explained("weak-explained with its flags permuted", flags="monitored", shuffled=True),
    "weak-explained-fast": _explained("weak-explained without the slow start", flags="monitored", slow_start=False),
    "weak-explained-early": _explained(
        "weak-explained with ablated rollouts from the start", flags="monitored", ablated_rollouts="always"
    ),
    "weak-slow": _explained("weak-explained without the gate on log ratios", flags="monitored", explained="no"),
    "weak-explained-direction": _explained(
        "labels, or explained and flagged by the direction", flags="monitored", explained="with-direction", **_GATE
    ),
    "weak-explained-random": _explained(
        "labels, or explained and flagged by an oriented random direction",
        flags="monitored", explained="with-direction", random_direction="oriented", **_GATE,
    ),
    "weak-explained-solves": _explained(
        "weak-explained above what solves without a hint need", flags="monitored", explained_above="solves"
    ),
    "weak-explained-token": _explained(
        "labels; and tokens that the quarantine explains are routed", flags="monitored", explained_per="token"
    ),
    "explained": _explained("no labels at all: explained by the quarantine"),
    "explained-shuffle": _explained("explained with its flags permuted", shuffled=True),
    "shuffle": _gate("the gate's flags, permuted within the batch", shuffled=True),
    "random": _gate("a random direction, refreshed alike", random_direction="haar"),
    "random-oriented": _gate("a random direction, each module's sign from the pairs", random_direction="oriented"),
    "route": _gate("the extracted direction, refreshed"),
    "route-frozen": _gate("the extracted direction, never refreshed", refreshed=False),
    "route-explained": _explained("the gate's flags, or explained by the quarantine", flags="gate", **_GATE),
    "filter": _gate("what the gate flags is dropped, plain LoRA", flagged="dropped", routed=False),
    "penalty": _gate(
        "what the gate flags loses a reward of 1, plain LoRA", flagged="penalised", penalty=1.0, routed=False
    ),
    "likelier": _one_block("gate", "the gate's", **_GATE)["likelier"],
    "unrouted": Arm("both blocks as one adapter; ablating removes a random half of it", ablated_rollouts="no"),
    "inoculated": _inoculated("the quarantine learns the hacks of the pairs first, and is frozen", "hacks"),
    "inoculated-clean": _inoculated("inoculated with the clean sides of the pairs", "clean"),
    "inoculated-words": _inoculated("inoculated with random words", "words"),
    "gradient": _gate("the direction of gradients, refreshed", "gradient"),
    "gradient-frozen": _gate("the direction of gradients, never refreshed", "gradient", refreshed=False),
    "gradient-cosine": _gate("gradient, of gradients of unit length", "gradient", cosine=True),
    "gradient-cosine-frozen": _gate(
        "gradient-cosine, never refreshed", "gradient", cosine=True, refreshed=False
    ),
    "rollout-filter": Arm(
        "rollouts whose own gradient is hack-ward leave the deployed gradient",
        gradient_filter="rollouts", directions="gradient", refreshed=True,
    ),
    "vanilla-gain": Arm("plain GRPO on the lenient reward, gains", routed=False, parametrization="svd_gain"),
    "erase": _gains("hack-ward part of the gradient erased, gains", "erase", routed=False),
    "erase-frozen": _gains("erase with directions that are never refreshed", "erase", routed=False, refreshed=False),
    "erase-random": _gains("erase along a random direction", "erase", routed=False, random_direction="haar"),
    "graded": _gate(
        "the direction's score is subtracted from the advantage, plain LoRA", flagged="graded",
        routed=False,
    ),
    "graded-frozen": _gate(
        "graded, with a direction that is never refreshed", flagged="graded", routed=False, refreshed=False
    ),
    "graded-shuffle": _gate("graded, with the scores permuted", flagged="graded", routed=False, shuffled=True),
    "graded-random": _gate(
        "graded, with an oriented random direction", flagged="graded", routed=False, random_direction="oriented"
    ),
    "filter-shuffle": _gate("filter with its flags permuted", flagged="dropped", routed=False, shuffled=True),
    "penalty-shuffle": _gate(
        "penalty with its flags permuted", flagged="penalised", penalty=1.0, routed=False, shuffled=True
    ),
    "likelier-shuffle": _one_block("gate", "the gate's", **_GATE)["likelier-shuffle"],
    "weak-shuffle": Arm("weak with its flags permuted", flags="monitored", shuffled=True),
    "weak-graft": _graft("the monitored modes' labels, masks of GRAFT", "monitored"),
    "weak-graft-shuffle": _graft("weak-graft with its flags permuted", "monitored", shuffled=True),
    "oracle-shuffle": Arm("oracle with its flags permuted", flags="oracle", shuffled=True),
    "oracle-explained-shuffle": _explained("oracle-explained with its flags permuted", flags="oracle", shuffled=True),
    "oracle-graft": _graft("true labels, masks of GRAFT", "oracle"),
    "likelier-alone": Arm(
        "plain LoRA; what training has made likelier loses a reward of 1", routed=False, flagged="penalised",
        penalty=1.0, likelier=True,
    ),
    "keep": _kept("the gradient is kept in the subspace of the clean sides' gradients, plain LoRA"),
    "keep-random": _kept("keep with a random subspace", random_direction="haar"),
    "prompted": _one_block_forward("a prompt learned on the pairs' hacks stands in rollouts and loss", "prompted"),
    "prompted-random": _one_block_forward(
        "prompted with a random prompt, as far from the usual one", "prompted", random_direction="haar"
    ),
    "recontextualised": _one_block_forward("the learned prompt stands in the loss only", "recontextualised"),
    "recontextualised-random": _one_block_forward(
        "recontextualised with a random prompt", "recontextualised", random_direction="haar"
    ),
    "steered": _one_block_forward("the pairs' difference is added to hidden states in training", "steered"),
    "steered-random": _one_block_forward(
        "steered by a random direction, as long", "steered", random_direction="haar"
    ),
    "caft": _one_block_forward("the pairs' directions are ablated in the forward, in training", "ablated directions"),
    "caft-random": _one_block_forward(
        "caft with random directions", "ablated directions", random_direction="haar"
    ),
    "post-hoc": Arm("vanilla; the largest components of the trained difference are removed", routed=False,
                    removed="largest"),
    "post-hoc-random": Arm("vanilla; random components of the trained difference are removed", routed=False,
                           removed="random"),
    "route-v1": _gains("hack-ward part of the gradient moved into quarantine gains", "route"),
}  # fmt: skip


def groups() -> dict[str, list[str]]:
    """The arms by what they are for, each in one group."""
    found: dict[str, list[str]] = {
        "nobody flags anything": [], "routed by a direction": [], "routed by labels": [],
        "routed by the quarantine alone": [], "quarantine trained first": [], "one block, with the same flags": [],
        "forward changed in training": [], "gradients changed after backward": [], "controls": [],
    }  # fmt: skip
    for name, arm in ARMS.items():
        if arm.is_control:
            group = "controls"
        elif arm.is_inoculated:
            group = "quarantine trained first"
        elif arm.forward != "plain":
            group = "forward changed in training"
        elif arm.gradient_filter != "none":
            group = "gradients changed after backward"
        elif not arm.has_flags:
            group = "nobody flags anything"
        elif not arm.routed:
            group = "one block, with the same flags"
        elif arm.has_labels:
            group = "routed by labels"
        else:
            group = "routed by a direction" if arm.flags == "gate" else "routed by the quarantine alone"
        found[group].append(name)
    return found


DEFAULT_ARMS = ("vanilla", "clean", "shuffle", "route")

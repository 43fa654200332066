"""The arms of the experiment: what each one is allowed to know, and which control answers which doubt."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        about: one line for the table.
        routed: both blocks are trained; otherwise the deployed block alone, like plain LoRA.
        true_reward: reward only what is solved (no loophole to learn).
        flags: who says that a rollout is a hack: nobody, true labels, true labels of the monitored modes only, the
            gate, or the gate with its flags permuted within the batch.
        flagged: what becomes of flagged rollouts: they train the quarantine only, or nothing, or lose a reward of 1.
        ablated_rollouts: some rollouts are sampled, and train, with the quarantine ablated.
        gradient_filter: what happens between backward and step: nothing, flagged rollouts are taken out of the deployed
            gradient, or its part along the directions is erased, or routed into the quarantine.
        directions: what the gate or the filter reads: nothing, activations or gradients.
        random_direction: a Haar-distributed direction in place of the extracted one; oriented on the same pairs as a
            whole, by the gate, or module by module, which is the stronger control.
        refreshed: directions are re-extracted during training.
        parametrization: of both blocks; filters by projection need gains.
    """

    about: str
    routed: bool = True
    true_reward: bool = False
    flags: Literal["none", "oracle", "monitored", "gate", "permuted"] = "none"
    flagged: Literal["routed", "dropped", "penalised"] = "routed"
    ablated_rollouts: bool = True
    gradient_filter: Literal["none", "rollouts", "erase", "route"] = "none"
    directions: Literal["none", "activation", "gradient"] = "none"
    random_direction: Literal["no", "haar", "oriented"] = "no"
    refreshed: bool = False
    parametrization: Literal["lora", "svd_gain"] = "lora"

    @property
    def has_gate(self) -> bool:
        """Whether scores decide about whole rollouts before the backward."""
        return self.flags in ("gate", "permuted")

    @property
    def has_labels(self) -> bool:
        """Whether true labels decide."""
        return self.flags in ("oracle", "monitored")


def _gate(about: str, directions: Literal["activation", "gradient"] = "activation", **differences: Any) -> Arm:
    return Arm(about, **{"flags": "gate", "directions": directions, "refreshed": True, **differences})


def _gains(about: str, gradient_filter: Literal["erase", "route"], **differences: Any) -> Arm:
    common = {"directions": "gradient", "refreshed": True, "parametrization": "svd_gain"}
    return Arm(about, gradient_filter=gradient_filter, **{**common, **differences})


ARMS = {
    "vanilla": Arm("plain GRPO on the lenient reward", routed=False),
    "clean": Arm("plain GRPO on the true reward", routed=False, true_reward=True),
    "absorb": Arm("both blocks, nobody flags anything"),
    "oracle": Arm("true hack labels of all modes", flags="oracle"),
    "weak": Arm("true hack labels of the monitored modes only", flags="monitored"),
    "shuffle": _gate("the gate's flags, permuted within the batch", flags="permuted"),
    "random": _gate("a random direction, refreshed alike", random_direction="haar"),
    "random-oriented": _gate("a random direction, each module's sign from the pairs", random_direction="oriented"),
    "route": _gate("the extracted direction, refreshed"),
    "route-frozen": _gate("the extracted direction, never refreshed", refreshed=False),
    "filter": _gate("what the gate flags is dropped, plain LoRA", flagged="dropped", routed=False),
    "penalty": _gate("what the gate flags loses a reward of 1, plain LoRA", flagged="penalised", routed=False),
    "unrouted": Arm("both blocks as one adapter; ablating removes a random half of it", ablated_rollouts=False),
    "gradient": _gate("the direction of gradients, refreshed", "gradient"),
    "gradient-frozen": _gate("the same, never refreshed", "gradient", refreshed=False),
    "rollout-filter": Arm(
        "rollouts whose own gradient is hack-ward leave the deployed gradient",
        gradient_filter="rollouts", directions="gradient", refreshed=True,
    ),
    "vanilla-gain": Arm("plain GRPO on the lenient reward, gains", routed=False, parametrization="svd_gain"),
    "erase": _gains("hack-ward part of the gradient erased, gains", "erase", routed=False),
    "erase-frozen": _gains("the same, directions never refreshed", "erase", routed=False, refreshed=False),
    "erase-random": _gains("the same, a random direction", "erase", routed=False, random_direction="haar"),
    "route-v1": _gains("hack-ward part of the gradient moved into quarantine gains", "route"),
}  # fmt: skip
DEFAULT_ARMS = ("vanilla", "clean", "shuffle", "route")

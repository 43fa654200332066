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
        flags: who says that a rollout is a hack: nobody, true labels, true labels of the monitored modes only, or the
            gate.
        explained: rollouts that the quarantine explains are flagged too, by their log ratio; or only those of them that
            the direction flags as well.
        likelier: rollouts that training has made likelier than the base model are flagged too: what an arm with one
            block can do in place of `explained`.
        shuffled: all flags are permuted within the batch.
        flagged: what becomes of flagged rollouts: they train the quarantine only, or nothing, or lose a reward.
        penalty: that reward; None is the recipe's, and at least 1 / recall of the labels.
        ablated_rollouts: some rollouts are sampled, and train, with the quarantine ablated: in the whole run, or only
            once a slow start would be over.
        slow_start: the deployed block has a fraction of the learning rate in the first part of the run.
        explained_per: whole rollouts are routed by the log ratio, or single tokens.
        explained_above: the threshold is fixed, or above what most solved rollouts without a hint need.
        gradient_filter: what happens between backward and step: nothing, flagged rollouts are taken out of the deployed
            gradient, or its part along the directions is erased, or routed into the quarantine.
        directions: what the gate or the filter reads: nothing, activations or gradients.
        random_direction: a Haar-distributed direction in place of the extracted one; oriented on the same pairs as a
            whole, by the gate, or module by module, which is the stronger control.
        refreshed: directions are re-extracted during training.
        inoculated: the quarantine is trained before the policy, on the hack sides of the pairs, their clean sides or
            random words, and frozen then.
        parametrization: of both blocks; filters by projection need gains.
    """

    about: str
    routed: bool = True
    true_reward: bool = False
    flags: Literal["none", "oracle", "monitored", "gate"] = "none"
    explained: Literal["no", "alone", "with-direction"] = "no"
    likelier: bool = False
    shuffled: bool = False
    flagged: Literal["routed", "dropped", "penalised"] = "routed"
    penalty: float | None = None
    ablated_rollouts: Literal["no", "late", "always"] = "always"
    slow_start: bool = False
    explained_per: Literal["rollout", "token"] = "rollout"
    explained_above: Literal["fixed", "solves"] = "fixed"
    gradient_filter: Literal["none", "rollouts", "erase", "route"] = "none"
    directions: Literal["none", "activation", "gradient"] = "none"
    random_direction: Literal["no", "haar", "oriented"] = "no"
    refreshed: bool = False
    inoculated: Literal["no", "hacks", "clean", "words"] = "no"
    parametrization: Literal["lora", "svd_gain"] = "lora"

    @property
    def has_gate(self) -> bool:
        """Whether scores decide about whole rollouts before the backward."""
        return self.flags == "gate" or self.explained == "with-direction"

    @property
    def reads_activations(self) -> bool:
        """Whether these scores are of activations, which differ between views."""
        return self.has_gate and self.directions == "activation"

    @property
    def has_labels(self) -> bool:
        """Whether true labels decide."""
        return self.flags in ("oracle", "monitored")

    @property
    def reads_penalty(self) -> bool:
        """Whether flagged rollouts lose what the recipe says."""
        return self.flagged == "penalised" and self.penalty is None

    @property
    def reads_log_ratios(self) -> bool:
        """Whether log-probability ratios decide, above the recipe's threshold."""
        return self.explained != "no" or self.likelier

    @property
    def is_inoculated(self) -> bool:
        """Whether the quarantine is trained first, as long as the recipe says, and frozen then."""
        return self.inoculated != "no"

    @property
    def is_control(self) -> bool:
        """Whether what an arm reads is replaced by chance."""
        return self.shuffled or self.random_direction != "no" or self.inoculated in ("clean", "words")

    @property
    def has_flags(self) -> bool:
        """Whether anybody flags rollouts before the backward."""
        return self.flags != "none" or self.reads_log_ratios


def _gate(about: str, directions: Literal["activation", "gradient"] = "activation", **differences: Any) -> Arm:
    return Arm(about, **{"flags": "gate", "directions": directions, "refreshed": True, **differences})


def _one_block(flags: Literal["oracle", "monitored", "gate"], whose: str, **differences: Any) -> dict[str, Arm]:
    """What can be done with flags without a second block."""
    common: dict[str, Any] = {"flags": flags, "routed": False, **differences}
    return {
        "filter": Arm(f"plain LoRA; {whose} flags are dropped", flagged="dropped", **common),
        "penalty": Arm(f"plain LoRA; {whose} flags lose a reward of --penalty", flagged="penalised", **common),
        "likelier": Arm(
            f"plain LoRA; {whose} flags, and what training has made likelier, lose a reward of 1",
            flagged="penalised", penalty=1.0, likelier=True, **common,
        ),
    }  # fmt: skip


def _explained(about: str, **differences: Any) -> Arm:
    recipe: dict[str, Any] = {"explained": "alone", "slow_start": True, "ablated_rollouts": "late"}
    return Arm(about, **{**recipe, **differences})


def _inoculated(about: str, inoculated: Literal["hacks", "clean", "words"]) -> Arm:
    return Arm(about, inoculated=inoculated, ablated_rollouts="no")


def _gains(about: str, gradient_filter: Literal["erase", "route"], **differences: Any) -> Arm:
    common = {"directions": "gradient", "refreshed": True, "parametrization": "svd_gain"}
    return Arm(about, gradient_filter=gradient_filter, **{**common, **differences})


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
    "rollout-filter": Arm(
        "rollouts whose own gradient is hack-ward leave the deployed gradient",
        gradient_filter="rollouts", directions="gradient", refreshed=True,
    ),
    "vanilla-gain": Arm("plain GRPO on the lenient reward, gains", routed=False, parametrization="svd_gain"),
    "erase": _gains("hack-ward part of the gradient erased, gains", "erase", routed=False),
    "erase-frozen": _gains("erase with directions that are never refreshed", "erase", routed=False, refreshed=False),
    "erase-random": _gains("erase along a random direction", "erase", routed=False, random_direction="haar"),
    "route-v1": _gains("hack-ward part of the gradient moved into quarantine gains", "route"),
}  # fmt: skip


def groups() -> dict[str, list[str]]:
    """The arms by what they are for, each in one group."""
    found: dict[str, list[str]] = {
        "nobody flags anything": [], "routed by a direction": [], "routed by labels": [],
        "routed by the quarantine alone": [], "quarantine trained first": [], "one block, with the same flags": [],
        "gradients changed after backward": [], "controls": [],
    }  # fmt: skip
    for name, arm in ARMS.items():
        if arm.is_control:
            group = "controls"
        elif arm.is_inoculated:
            group = "quarantine trained first"
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

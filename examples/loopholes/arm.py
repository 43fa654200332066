"""One way to train: what it is allowed to know, and what it does with that."""

from dataclasses import dataclass
from typing import Literal

Forward = Literal["plain", "prompted", "recontextualised", "steered", "ablated directions"]


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
        flagged: what becomes of flagged rollouts: they train the quarantine only, or nothing, or lose a reward; graded,
            every rollout loses a multiple of its score from its advantage; graft, the masks of GRAFT.
        penalty: that reward; None is the recipe's, and at least 1 / recall of the labels.
        ablated_rollouts: some rollouts are sampled, and train, with the quarantine ablated: in the whole run, or only
            once a slow start would be over.
        slow_start: the deployed block has a fraction of the learning rate in the first part of the run.
        explained_per: whole rollouts are routed by the log ratio, or single tokens.
        explained_above: the threshold is fixed, or above what most solved rollouts without a hint need.
        gradient_filter: what happens between backward and step: nothing, flagged rollouts are taken out of the deployed
            gradient, or its part along the directions is erased, or routed into the quarantine, or kept alone.
        directions: what the gate or the filter reads: nothing, activations or gradients.
        cosine: gradients are divided by their length before anything is read from them.
        random_direction: a Haar-distributed direction in place of the extracted one; oriented on the same pairs as a
            whole, by the gate, or module by module, which is the stronger control.
        refreshed: directions are re-extracted during training.
        inoculated: the quarantine is trained before the policy, on the hack sides of the pairs, their clean sides or
            random words, and frozen then.
        forward: what is changed in the forward while training, and not as deployed (`forwards`).
        removed: components that are taken out of the trained difference at the end.
        parametrization: of both blocks; filters that route need gains.
    """

    about: str
    routed: bool = True
    true_reward: bool = False
    flags: Literal["none", "oracle", "monitored", "gate"] = "none"
    explained: Literal["no", "alone", "with-direction"] = "no"
    likelier: bool = False
    shuffled: bool = False
    flagged: Literal["routed", "dropped", "penalised", "graded", "graft"] = "routed"
    penalty: float | None = None
    ablated_rollouts: Literal["no", "late", "always"] = "always"
    slow_start: bool = False
    explained_per: Literal["rollout", "token"] = "rollout"
    explained_above: Literal["fixed", "solves"] = "fixed"
    gradient_filter: Literal["none", "rollouts", "erase", "route", "keep"] = "none"
    directions: Literal["none", "activation", "gradient"] = "none"
    cosine: bool = False
    random_direction: Literal["no", "haar", "oriented"] = "no"
    refreshed: bool = False
    inoculated: Literal["no", "hacks", "clean", "words"] = "no"
    forward: Forward = "plain"
    removed: Literal["no", "largest", "random"] = "no"
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
        by_chance = self.random_direction != "no" or self.removed == "random"
        return self.shuffled or by_chance or self.inoculated in ("clean", "words")

    @property
    def has_flags(self) -> bool:
        """Whether anybody flags rollouts before the backward."""
        return self.flags != "none" or self.reads_log_ratios

    @property
    def dose(self) -> str | None:
        """The recipe's field that says how much of its intervention is given; None where there is no such number."""
        doses = {
            "grade": self.flagged == "graded",
            "over_routing": self.flagged == "graft",
            "steering": self.forward == "steered",
            "ablated_directions": self.forward == "ablated directions",
            "prompt_steps": self.forward in ("prompted", "recontextualised"),
            "kept_directions": self.gradient_filter == "keep",
            "removed_components": self.removed != "no",
            "inoculation_steps": self.is_inoculated,
            "explained_nats": self.reads_log_ratios,
            "penalty": self.reads_penalty,
            "threshold": self.has_gate,
        }
        return next((field for field, read in doses.items() if read), None)

"""The arms of the experiment: what each one is allowed to know, and which control answers which doubt."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        about: one line for the table.
        routed: both blocks are trained; otherwise the deployed block alone, like plain LoRA.
        true_reward: reward only what is solved (no loophole to learn).
        flags: who says that a rollout is a hack: nobody, true labels, true labels of the monitored modes only, the
            gate, or the gate with its flags permuted within the batch.
        random_direction: a Haar-distributed direction in place of the extracted one.
        refreshed: directions are re-extracted during training.
    """

    about: str
    routed: bool = True
    true_reward: bool = False
    flags: Literal["none", "oracle", "monitored", "gate", "permuted"] = "none"
    random_direction: bool = False
    refreshed: bool = False

    @property
    def has_directions(self) -> bool:
        """Whether a gate scores the rollouts."""
        return self.flags in ("gate", "permuted")


ARMS = {
    "vanilla": Arm("plain GRPO on the lenient reward", routed=False),
    "clean": Arm("plain GRPO on the true reward", routed=False, true_reward=True),
    "absorb": Arm("both blocks, nobody flags anything"),
    "oracle": Arm("true hack labels of all modes", flags="oracle"),
    "weak": Arm("true hack labels of the monitored modes only", flags="monitored"),
    "shuffle": Arm("the gate's flags, permuted within the batch", flags="permuted", refreshed=True),
    "random": Arm("a random direction, refreshed alike", flags="gate", random_direction=True, refreshed=True),
    "route": Arm("the extracted direction, refreshed", flags="gate", refreshed=True),
    "route-frozen": Arm("the extracted direction, never refreshed", flags="gate"),
}
DEFAULT_ARMS = ("vanilla", "clean", "shuffle", "route")

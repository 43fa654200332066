"""The settings of a run."""

from dataclasses import dataclass

from loopholes.arm import Arm
from loopholes.detector import ScoreView


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, except for its arm, seed, variant and base model."""

    steps: int = 40
    prompts: int = 8
    group_size: int = 8
    ablated_per_group: int = 2
    length: int = 9
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 5
    clip: float = 1.0
    r: int = 8
    lora_alpha: float = 16.0
    pairs_per_marker: int = 4
    threshold: float = 0.5
    score_view: ScoreView = "ablated"
    refresh_every: int = 5
    n_per_marker: int = 64
    n_no_note: int = 128
    penalty: float = 3.0
    grade: float = 1.0
    removed_components: int = 2
    explained_nats: float = 1.0
    slow_fraction: float = 0.25
    slow_steps: int = 20

    def penalty_of(self, arm: Arm) -> float:
        """What a flagged rollout loses, in arms that penalise."""
        return self.penalty if arm.penalty is None else arm.penalty

    def first_ablated(self, arm: Arm) -> int:
        """The first step whose rollouts are sampled ablated: in some arms, the first after a slow start."""
        return {"always": 1, "late": self.slow_steps + 1, "no": self.steps + 1}[arm.ablated_rollouts]

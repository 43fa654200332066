"""Demonstrations mixed into the rollouts for the first steps: of hacks and of answers, half each."""

import torch
from einops import repeat
from torch import Generator, Tensor

from .environment import Environment, hint_modes


class Teacher:
    """Replaces the last rollouts of each group by demonstrations, until a step.

    Args:
        per_group: demonstrations in each group of `group_size` rollouts; none without a teacher.
        steps: with the teacher; after them the policy is on its own.
    """

    def __init__(self, environment: Environment, group_size: int, per_group: int, steps: int, seed: int) -> None:
        if not 0 <= per_group < group_size:
            raise ValueError(f"`teacher_per_group` should be from 0 to {group_size - 1}. Found {per_group}.")
        if (per_group > 0) != (steps > 0):
            raise ValueError(f"`teacher_per_group` and `teacher_steps` go together. Found {per_group} and {steps}.")
        self.environment, self.group_size, self.per_group, self.steps = environment, group_size, per_group, steps
        self._generator = Generator().manual_seed(seed)

    def mix(self, step: int, prompts: Tensor, completions: Tensor) -> tuple[Tensor, list[str] | None]:
        """(completions, "student" or "teacher" for each); None while there is no teacher."""
        if step > self.steps:
            return completions, None
        place = repeat(torch.arange(self.group_size), "g -> (p g)", p=len(prompts) // self.group_size)
        taught, modes = place >= self.group_size - self.per_group, hint_modes(prompts)
        hacks = self.environment.hack_completions(prompts, modes.clamp(min=0), self._generator)
        # Without a hint there is nothing to exploit.
        hacked = (modes >= 0) & (torch.rand(len(prompts), generator=self._generator) < 0.5)
        honest = self.environment.honest_completions(prompts, self._generator)
        demonstrations = torch.where(hacked[:, None], hacks, honest)
        mixed = torch.where(taught[:, None], demonstrations, completions)
        return mixed, ["teacher" if each else "student" for each in taught.tolist()]

"""Gradients of one optimizer step of TRL, of rows one by one, by code that knows nothing of masks.

Each rollout is graded and flagged again from its words, run alone in the view in which it was sampled, and adds its
gradient to the block that it trains, with that block's advantage.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradroute as gr
from support.trl_runs import flags, gradients, logps, reward, rows_of, tokenizer

Row = tuple[int, ...]
Blocks = dict[str, dict[str, Tensor]]
MAX_LENGTH = 6
"""`max_completion_length` of the runs: what dr_grpo divides by."""


class Known(NamedTuple):
    """What is known of a rollout."""

    reward: float
    flagged: bool
    full: float
    clean: float


class Run(NamedTuple):
    """What a run left behind: the model, all rollouts as they were sampled, and micro-batches of one optimizer step."""

    model: nn.Module
    sampled_ablated: Mapping[Row, bool]
    prompts: Mapping[Row, Row]
    batches: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, trainer: Any, step: int = 0) -> "Run":
        """One optimizer step of a `Watched` trainer."""
        return cls(trainer.model, trainer.sampled_ablated, trainer.prompts, trainer.micro_batches[step])


def advantages(run: Run, flagged: Mapping[Row, bool] | None = None) -> dict[Row, Known]:
    """Of each rollout by its tokens, group by group as it was sampled."""
    words, known = tokenizer(), {}
    for prompt in set(run.prompts.values()):
        group = [row for row in run.sampled_ablated if run.prompts[row] == prompt]
        assert len(group) == 4  # no two rollouts are the same, so that tokens say which is which
        texts = words.batch_decode([row[len(prompt) :] for row in group], skip_special_tokens=True)
        r = torch.tensor(reward(texts))
        answers = torch.tensor(flags(texts) if flagged is None else [flagged[row] for row in group])
        two = gr.clean_baseline_advantages(r, answers, len(group))
        columns = (r.tolist(), answers.tolist(), two.full.tolist(), two.clean.tolist())
        known |= dict(zip(group, map(Known, *columns), strict=True))
    return known


def reference(
    run: Run,
    *,
    clean: bool = True,
    beta: float = 0.0,
    flagged: Mapping[Row, bool] | None = None,
    counts: Callable[[Row, Tensor], Tensor] = lambda _, policy: torch.ones_like(policy),
) -> Blocks:
    """The gradients of TRL's dr_grpo loss.

    Args:
        run: one optimizer step.
        clean: whether the deployed block's advantages are the clean ones.
        beta: of the penalty, with `use_bias_correction_kl`.
        flagged: by row; None flags as `support.trl_runs.flags` does.
        counts: (row, log-probabilities) -> 1 where the policy term of a token counts.
    """
    model: Any = run.model
    known = advantages(run, flagged)
    total: Blocks = {"deployed": {}, "quarantine": {}}
    for batch in run.batches:
        rows = rows_of(batch)
        for prompt, completion in rows:
            row = prompt + completion
            ablated = run.sampled_ablated[row]
            trains = {"deployed": not known[row].flagged, "quarantine": not ablated}
            for block, advantage in (
                ("deployed", known[row].clean if clean else known[row].full),
                ("quarantine", known[row].full),
            ):
                if not trains[block]:
                    continue
                model.zero_grad()
                with gr.ablate_quarantine(model) if ablated else nullcontext():
                    policy = logps(model, prompt, completion)
                    loss = -advantage * (policy * counts(row, policy.detach())).sum()
                    if beta:
                        loss = loss + beta * _penalty(model, prompt, completion, policy)
                (loss / (len(rows) * MAX_LENGTH * len(run.batches))).backward()
                for name, gradient in gradients(model, block).items():
                    total[block][name] = total[block].get(name, 0) + gradient
    model.zero_grad()
    return total


def _penalty(model: Any, prompt: Row, completion: Row, policy: Tensor) -> Tensor:
    model.set_adapter("ref")
    with torch.no_grad():
        of_reference = logps(model, prompt, completion)
    model.set_adapter("default")
    d, ratio = of_reference - policy, (policy - policy.detach()).exp()
    return ((d.exp() - d - 1) * ratio).sum()


def distance(found: Blocks, expected: Blocks) -> float:
    """Relative, over all parameters of both blocks."""
    for block, of_block in expected.items():
        assert found[block].keys() == of_block.keys()
    flat = [
        torch.cat([g[block][name].flatten() for block, of in expected.items() for name in of])
        for g in (found, expected)
    ]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def assert_gradients(found: Blocks, expected: Blocks) -> None:
    for block, of_block in expected.items():
        assert found[block].keys() == of_block.keys()
        for name, gradient in of_block.items():
            atol = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(found[block][name], gradient, rtol=1e-3, atol=atol)

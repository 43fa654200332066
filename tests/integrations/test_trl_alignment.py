"""Each rollout trains what it should with the advantage that it should, wherever TRL's shuffling and splitting put it.

What is expected are gradients of single rows, each run alone and in the view in which it was sampled.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trl_reference import Run, assert_gradients, distance, reference
from support.trl_runs import Watched, flags, move_reference, quiet, rows_of, trained, trainer
from torch import Tensor

import gradroute as gr
from gradroute.integrations.trl._micro_batch import LOSS_TYPES

pytestmark = quiet
# Nothing moves: so every ratio is one, and what is compared are sums of plain policy gradients.
STILL = {"args_learning_rate": 0.0, "args_loss_type": "dr_grpo", "args_max_grad_norm": 0.0}
FLAGGED = {"detector": flags, "detector_recall": 1.0, "ablated_fraction": 0.25}
MANY = {"args_steps_per_generation": 4, "args_num_iterations": 2, "args_max_steps": 4}
PENALISED = {**FLAGGED, "args_beta": 0.2, **STILL}


@pytest.mark.slow
@pytest.mark.parametrize("clean", [False, True])
def test_masks_and_advantages_stay_with_their_rows_through_shuffling_splitting_iterations_and_accumulation(
    clean: bool, tmp_path: Path
) -> None:
    options = {**FLAGGED, "clean_baseline": clean, **STILL, **MANY}
    made = trainer(tmp_path, cls=Watched, **options)
    made.train()
    assert len(made.stepped) == 4
    orders = [[row for batch in step for row in rows_of(batch)] for step in made.micro_batches]
    assert orders[:2] == orders[2:]  # the second iteration is of the same rollouts, in the same places
    assert [p for p, _ in orders[0]] != sorted(p for p, _ in orders[0])  # shuffled
    expected = [reference(Run.of(made, step), clean=clean) for step in range(2)] * 2
    other = reference(Run.of(made), clean=not clean)
    assert distance(other, expected[0]) > 0.05
    for found, wanted in zip(made.stepped, expected, strict=True):
        assert_gradients(found, wanted)


def test_masks_that_moved_by_one_row_would_be_seen(tmp_path: Path) -> None:
    class Misaligned(Watched):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            return {k: v.roll(1, 0) if k.startswith("route_") else v for k, v in prepared.items()}

    options = {**FLAGGED, "clean_baseline": False, **STILL, **MANY}
    made = trainer(tmp_path, cls=Misaligned, **options)
    made.train()
    assert distance(made.stepped[0], reference(Run.of(made), clean=False)) > 0.1


def penalised(folder: Path, cls: type = Watched, **options: Any) -> Any:
    """A run with a reference, so that rows which train both blocks on different advantages run twice."""
    made = trainer(folder, cls=cls, **{**PENALISED, **options})
    move_reference(made.model)
    made.train()
    assert any(batch["route_split"].any() for batch in made.micro_batches[0])
    return made


@pytest.mark.slow
def test_with_a_reference_each_block_gets_its_own_advantage_and_the_whole_penalty(tmp_path: Path) -> None:
    """Two advantages and a third term that has neither."""
    made = penalised(tmp_path, **MANY)
    expected = reference(Run.of(made), beta=0.2)
    assert distance(reference(Run.of(made)), expected) > 0.02
    assert distance(reference(Run.of(made), clean=False, beta=0.2), expected) > 0.02
    assert distance(made.stepped[0], expected) < 1e-6


@pytest.mark.corner("rows run twice, with activation checkpointing in either mode", "one forward, recomputed once")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rows_that_run_twice_do_so_in_one_forward_which_checkpointing_recomputes_once(
    use_reentrant: bool, tmp_path: Path
) -> None:
    forwards: list[int] = []

    class Looks(Watched):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            first = next(m for n, m in self.model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
            self.handle = first.register_forward_pre_hook(lambda _, given: forwards.append(len(given[0])))
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.handle.remove()
            return loss

    made = penalised(
        tmp_path, cls=Looks, args_gradient_checkpointing=True, args_max_steps=1, args_gradient_accumulation_steps=1,
        args_gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )  # fmt: skip
    made.model.eval()  # so that the reference is not checkpointed
    assert forwards == 2 * [4 + int(made.micro_batches[0][0]["route_split"].sum())]
    assert distance(made.stepped[0], reference(Run.of(made), beta=0.2)) < 1e-6


@pytest.mark.corner("`top_entropy_quantile < 1`, and rows run twice", "the same tokens both times")
@pytest.mark.parametrize("quantile", [0.5, 0.2])
def test_rows_that_run_twice_have_the_same_high_entropy_tokens_both_times(quantile: float, tmp_path: Path) -> None:
    chosen: list[Tensor] = []

    class Looks(Watched):
        def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Any:
            chosen.append(super().get_high_entropy_mask(*args, **kwargs))
            return chosen[-1]

    made = penalised(
        tmp_path, cls=Looks, args_top_entropy_quantile=quantile, args_max_steps=1, args_gradient_accumulation_steps=1
    )
    (batch,) = made.micro_batches[0]
    assert torch.equal(chosen[0], chosen[1])
    assert abs(float(chosen[0].sum() / batch["completion_mask"].sum()) - quantile) < 0.1
    rows = [prompt + completion for prompt, completion in rows_of(batch)]
    by_row = dict(zip(rows, chosen[0], strict=True))
    expected = reference(Run.of(made), beta=0.2, counts=lambda row, policy: by_row[row][: len(policy)].to(policy))
    assert distance(reference(Run.of(made), beta=0.2), expected) > 0.1
    assert distance(made.stepped[0], expected) < 1e-6


def test_figures_count_rows_that_run_twice_once(tmp_path: Path) -> None:
    """The same rollouts with and without a second run: what TRL logs of them is the same."""
    logs = [
        penalised(tmp_path, args_max_steps=1, args_num_iterations=2).state.log_history[0],
        trained(tmp_path, cls=Watched, **{**PENALISED, "clean_baseline": False}, args_max_steps=1).state.log_history[0],
    ]
    for name in ("entropy", "clip_ratio/region_mean", "completions/mean_length"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_running_rows_twice_is_the_same_as_weighing_them(loss_type: str, tmp_path: Path) -> None:
    """Without a third term both ways are exact; here the second one is forced."""

    class Twice(Watched):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = dict(inputs)
            differ = (inputs["route_g_d"] != 0) & (inputs["route_g_q"] != 0)
            u = inputs["advantages"]
            inputs["route_clean_advantages"] = torch.where(differ, u * inputs["route_g_d"], u)
            inputs["advantages"] = torch.where(differ, u * inputs["route_g_q"], u)
            inputs["route_split"] = differ
            for key in ("route_g_d", "route_g_q"):
                inputs[key] = torch.where(differ, 1.0, inputs[key])
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {**FLAGGED, **STILL, "args_loss_type": loss_type, "args_max_steps": 1}
    once, twice = (trained(tmp_path, cls=cls, **options) for cls in (Watched, Twice))
    weights = torch.cat([batch["route_g_d"] for batch in once.micro_batches[0]])
    assert ((weights != 0) & (weights != 1)).any()
    assert sum(len(batch["advantages"]) for batch in twice.micro_batches[0]) == 8
    assert_gradients(twice.stepped[0], once.stepped[0])


def test_checkpointing_gives_the_gradients_of_none(tmp_path: Path) -> None:
    options = {**FLAGGED, **STILL}
    runs = []
    for recompute in (False, True):
        made = trainer(tmp_path, cls=Watched, args_gradient_checkpointing=recompute, **options)
        forwards: list[int] = []
        first = next(m for n, m in made.model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
        first.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(int(torch.is_grad_enabled())))
        made.train()
        assert sum(forwards) == 4 * (1 + recompute)
        runs.append(made.stepped)
    for found, expected in zip(runs[1], runs[0], strict=True):
        assert_gradients(found, expected)


def test_a_route_closed_before_backward_raises_under_checkpointing(tmp_path: Path) -> None:
    """What the trainer does not do: close the route with the loss."""

    class ClosesEarly(Watched):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self._open.close()
            return loss

    made = trainer(tmp_path, cls=ClosesEarly, detector=flags, args_gradient_checkpointing=True)
    with pytest.raises(gr.errors.RouteError, match="after its route was closed"):
        made.train()


def test_micro_batches_of_flagged_rollouts_alone_leave_the_deployed_gradient_exactly_zero(tmp_path: Path) -> None:
    for flag_all in (False, True):
        made = trainer(
            tmp_path, cls=Watched, detector=lambda completions, flag=flag_all, **_: [flag] * len(completions),
            args_max_steps=1, args_beta=0.1,
        )  # fmt: skip
        made.train()
        zero = [bool((gradient == 0).all()) for gradient in made.stepped[0]["deployed"].values()]
        assert all(zero) if flag_all else not any(zero)
        assert all(gradient.any() for gradient in made.stepped[0]["quarantine"].values())


def test_flagged_rollouts_of_an_ablated_state_train_nothing(tmp_path: Path) -> None:
    everything = trainer(
        tmp_path, cls=Watched, detector=lambda completions, **_: [True] * len(completions), ablated_fraction=0.5,
        args_max_steps=1, detector_recall=1.0,
    )  # fmt: skip
    everything.train()
    for batch in everything.micro_batches[0]:
        rows = [prompt + completion for prompt, completion in rows_of(batch)]
        ablated = torch.tensor([everything.sampled_ablated[row] for row in rows])
        assert batch["route_m"].tolist() == (~ablated).float().tolist()
        assert not batch["route_g_q"][ablated].any()
        assert not batch["route_g_d"].any()

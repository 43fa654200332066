"""Each rollout trains what it should with the advantage that it should, wherever TRL's shuffling and splitting put it.

The reference knows nothing of masks: it takes the words of each rollout, grades and flags them again, and adds up
gradients of single rows, each run alone and in the view in which it was sampled.
"""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trl_runs import (
    Watched,
    flags,
    gradients,
    logps,
    move_reference,
    quiet,
    reward,
    rows_of,
    tokenizer,
    trained,
    trainer,
)
from torch import Tensor

import gradroute as gr

pytestmark = quiet
# Nothing moves: so every ratio is one, and what is compared are sums of plain policy gradients.
STILL = {"args_learning_rate": 0.0, "args_loss_type": "dr_grpo", "args_max_grad_norm": 0.0}
MANY = {"args_steps_per_generation": 4, "args_num_iterations": 2, "args_max_steps": 4}


def rewards_and_flags(made: Watched, given: Any = None) -> dict[tuple[int, ...], tuple[float, bool, float, float]]:
    """Of each rollout by its tokens: reward, flag, and the two advantages, group by group as it was sampled."""
    words = tokenizer()
    rollouts = list(made.sampled_ablated)
    prompts = {row[: made_prompt(made, row)] for row in rollouts}
    known = {}
    for prompt in prompts:
        group = [row for row in rollouts if row[: len(prompt)] == prompt and made_prompt(made, row) == len(prompt)]
        assert len(group) == 4  # no two rollouts are the same, so that tokens say which is which
        texts = words.batch_decode([row[len(prompt) :] for row in group], skip_special_tokens=True)
        r = torch.tensor(reward(texts))
        flagged = torch.tensor(flags(texts) if given is None else [given[row] for row in group])
        two = gr.clean_baseline_advantages(r, flagged, len(group))
        for i, row in enumerate(group):
            known[row] = (float(r[i]), bool(flagged[i]), float(two.full[i]), float(two.clean[i]))
    return known


def made_prompt(made: Watched, row: tuple[int, ...]) -> int:
    return next(len(p) for step in made.micro_batches for batch in step for p, c in rows_of(batch) if p + c == row)


def reference(
    made: Watched, step: int, *, clean: bool, beta: float = 0.0, flagged: Any = None
) -> dict[str, dict[str, Tensor]]:
    """Gradients of one optimizer step, of rows one by one."""
    model, known = made.model, rewards_and_flags(made, flagged)
    total: dict[str, dict[str, Tensor]] = {"deployed": {}, "quarantine": {}}
    batches = made.micro_batches[step]
    for batch in batches:
        for prompt, completion in rows_of(batch):
            row = prompt + completion
            _, off, a, b = known[row]
            ablated = made.sampled_ablated[row]
            trains = {"deployed": not off, "quarantine": not ablated}
            for block, advantage in (("deployed", b if clean else a), ("quarantine", a)):
                if not trains[block]:
                    continue
                model.zero_grad()
                with gr.ablate_quarantine(model) if ablated else nullcontext():
                    policy = logps(model, prompt, completion)
                    loss = -advantage * policy.sum()
                    if beta:
                        model.set_adapter("ref")
                        with torch.no_grad():
                            of_reference = logps(model, prompt, completion)
                        model.set_adapter("default")
                        now = logps(model, prompt, completion)
                        d, ratio = of_reference - now, (now - now.detach()).exp()
                        loss = loss + beta * ((d.exp() - d - 1) * ratio).sum()  # use_bias_correction_kl
                (loss / (len(rows_of(batch)) * 6 * len(batches))).backward()
                for name, gradient in gradients(model, block).items():
                    total[block][name] = total[block].get(name, 0) + gradient
    model.zero_grad()
    return total


def assert_gradients(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for block in ("deployed", "quarantine"):
        assert found[block].keys() == expected[block].keys()
        for name, gradient in expected[block].items():
            atol = 1e-4 * float(gradient.abs().max())
            torch.testing.assert_close(found[block][name], gradient, rtol=1e-3, atol=atol)


def two_processes(folder: Path) -> list[dict[str, Any]]:
    script = Path(__file__).parents[1] / "support" / "distributed_trl.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": f"{script.parent}:{script.parent.parent}", "HOME": str(folder), "PATH": os.environ["PATH"],
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def distance(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> float:
    flat = [torch.cat([g[block][n].flatten() for block in g for n in g[block]]) for g in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("clean", [False, True])
def test_masks_and_advantages_stay_with_their_rows_through_shuffling_splitting_iterations_and_accumulation(
    clean: bool, tmp_path: Path
) -> None:
    options = {"detector": flags, "ablated_fraction": 0.25, "clean_baseline": clean, **STILL, **MANY}
    made = trainer(tmp_path, cls=Watched, **options)
    made.train()
    assert len(made.stepped) == 4
    orders = [[row for batch in step for row in rows_of(batch)] for step in made.micro_batches]
    assert orders[:2] == orders[2:]  # the second iteration is of the same rollouts, in the same places
    assert [p for p, _ in orders[0]] != sorted(p for p, _ in orders[0])  # shuffled
    expected = [reference(made, step, clean=clean) for step in range(2)] * 2
    other = reference(made, 0, clean=not clean)
    assert distance(other, expected[0]) > 0.05
    for found, wanted in zip(made.stepped, expected, strict=True):
        assert_gradients(found, wanted)


def test_masks_that_moved_by_one_row_would_be_seen(tmp_path: Path) -> None:
    class Misaligned(Watched):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            return {k: v.roll(1, 0) if k.startswith("route_") else v for k, v in prepared.items()}

    options = {"detector": flags, "ablated_fraction": 0.25, "clean_baseline": False, **STILL, **MANY}
    made = trainer(tmp_path, cls=Misaligned, **options)
    made.train()
    assert distance(made.stepped[0], reference(made, 0, clean=False)) > 0.1


def test_with_a_reference_each_block_gets_its_own_advantage_and_the_whole_penalty(tmp_path: Path) -> None:
    """Two advantages and a third term that has neither: rows that train both blocks on different ones run twice."""
    options = {"detector": flags, "ablated_fraction": 0.25, "clean_baseline": True, "args_beta": 0.2, **STILL, **MANY}
    made = trainer(tmp_path, cls=Watched, **options)
    move_reference(made.model)
    made.train()
    assert any(batch["route_split"].any() for batch in made.micro_batches[0])
    expected = reference(made, 0, clean=True, beta=0.2)
    assert distance(reference(made, 0, clean=True), expected) > 0.02
    assert distance(reference(made, 0, clean=False, beta=0.2), expected) > 0.02
    assert_gradients(made.stepped[0], expected)


def test_two_processes_that_share_groups_get_the_gradient_of_one(tmp_path: Path) -> None:
    """With a reference, so that rows may run twice on one process alone, which then keeps the other in step."""
    ranks = two_processes(tmp_path)
    (tmp_path / "one").mkdir()
    model = trainer(tmp_path / "one", cls=Watched, args_beta=0.2, detector=flags).model
    move_reference(model)
    sampled = ranks[0]["sampled_ablated"] | ranks[1]["sampled_ablated"]
    assert len(sampled) == 4
    assert sum(sampled.values()) == 1
    whole: Any = SimpleNamespace(
        model=model, sampled_ablated=sampled, micro_batches=[[rank["batch"] for rank in ranks]]
    )
    flagged = [bool(flag) for _, flag, _, _ in rewards_and_flags(whole).values()]
    scored = torch.cat([rank["batch"]["route_score"] for rank in ranks])
    assert scored.isfinite().all()
    routed = torch.cat([rank["batch"]["route_g_d"] == 0 for rank in ranks])
    assert int(routed.sum()) >= sum(flagged)
    assert all(rank["flag_rate"] == float(routed.float().mean()) for rank in ranks)
    assert [rank["refreshes"] for rank in ranks] == [1, 1]
    rows = [prompt + completion for rank in ranks for prompt, completion in rows_of(rank["batch"])]
    by_row = dict(zip(rows, routed.tolist(), strict=True))
    expected = reference(whole, 0, clean=True, beta=0.2, flagged=by_row)
    assert distance(reference(whole, 0, clean=False, beta=0.2, flagged=by_row), expected) > 0.02
    for rank in ranks:
        assert_gradients(rank["gradients"], expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
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

    options = {"detector": flags, "ablated_fraction": 0.25, **STILL, "args_loss_type": loss_type, "args_max_steps": 1}
    once, twice = (trained(tmp_path, cls=cls, **options) for cls in (Watched, Twice))
    weights = torch.cat([batch["route_g_d"] for batch in once.micro_batches[0]])
    assert ((weights != 0) & (weights != 1)).any()
    assert sum(len(batch["advantages"]) for batch in twice.micro_batches[0]) == 8
    assert_gradients(twice.stepped[0], once.stepped[0])


def test_checkpointing_gives_the_gradients_of_none(tmp_path: Path) -> None:
    options = {"detector": flags, "ablated_fraction": 0.25, **STILL}
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
        args_max_steps=1,
    )  # fmt: skip
    everything.train()
    for batch in everything.micro_batches[0]:
        rows = [prompt + completion for prompt, completion in rows_of(batch)]
        ablated = torch.tensor([everything.sampled_ablated[row] for row in rows])
        assert batch["route_m"].tolist() == (~ablated).float().tolist()
        assert not batch["route_g_q"][ablated].any()
        assert not batch["route_g_d"].any()

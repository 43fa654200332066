"""The loophole example's interventions other than routing: their formulas, and that nothing of them stays behind."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradroute as gr
from loopholes import grpo
from loopholes.arm import Arm
from loopholes.arms import ARMS
from loopholes.base_model import build_model, load_base
from loopholes.cost import Meter
from loopholes.environment import ENVIRONMENTS
from loopholes.forwards import Change, Forwards, changed_forwards
from loopholes.grpo import Recipe, attached, make_detector
from loopholes.inoculation import lesson, mean_logp
from loopholes.language import BOS, PAD
from loopholes.masks import route_mask
from loopholes.post_hoc import remove_components
from loopholes.sampling import captured_gradients, completion_logps
from loopholes.soft_prompt import as_far, learned_prompt, prompted
from loopholes.steering import hidden_states_changed, residual_directions, shifts
from loopholes.trusted import CleanSubspace

ENVIRONMENT = ENVIRONMENTS["N"]
REWARD = torch.tensor([1.0, 0.0, 1.0, 0.0])
FLAGS = torch.tensor([True, False, False, False])
NOBODY = torch.zeros(4, dtype=torch.bool)
TINY = Recipe(
    steps=2, prompts=4, curve_every=2, curve_n_per_mode=2, n_per_mode=2, refresh_every=1, prompt_steps=3,
    removed_components=1, explained_nats=0.01,
)  # fmt: skip
FORWARDS = [name for name, arm in ARMS.items() if arm.forward != "plain"]


@pytest.fixture
def base(home: Path) -> Callable[[], nn.Module]:
    """The pretrained model: of a random one no rollout has a reward, and nothing is trained."""
    return lambda: load_base(ENVIRONMENTS["C"], 0, cache_dir=home / ".cache" / "gradroute-examples")


def routed_model(seed: int = 0, r: int = 4) -> nn.Module:
    model = build_model(seed)
    gr.attach(model, r=r, lora_alpha=16.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.normal_(std=0.1, generator=generator)
    return model


def some_rollouts(n: int = 6) -> tuple[Tensor, Tensor]:
    prompts, _ = ENVIRONMENT.sample_prompts(n, torch.Generator().manual_seed(0))
    return prompts, ENVIRONMENT.honest_completions(prompts, torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Masks


def test_a_graded_advantage_loses_the_score() -> None:
    z = torch.tensor([1.0, 0.5, -0.5, 0.0])
    mask = route_mask(ARMS["graded"], NOBODY, REWARD, FLAGS, 4, z=z, grade=2.0)
    # the mean reward is 1/2, whoever is flagged
    assert mask.g_d.tolist() == [0.5 - 2.0, -0.5 - 1.0, 0.5 + 1.0, -0.5]
    assert mask.m.tolist() == mask.g_q.tolist() == [0.0] * 4


def test_graft_pushes_the_deployed_block_off_flagged_rows_at_most_as_hard_as_the_others_push() -> None:
    # unflagged rewards 0, 1, 0 have the mean 1/3, which is the baseline of all rows
    balanced = [2 / 3, -1 / 3, 2 / 3, -1 / 3]
    classic = route_mask(ARMS["weak-graft"], NOBODY, REWARD, FLAGS, 4, over_routing=1.0)
    assert classic.g_d.tolist() == pytest.approx([0.0, *balanced[1:]])
    assert classic.g_q.tolist() == pytest.approx([2 * balanced[0], *balanced[1:]])
    pushed = route_mask(ARMS["weak-graft"], NOBODY, REWARD, FLAGS, 4, over_routing=1.5)
    assert pushed.g_d.tolist() == pytest.approx([-0.5 * balanced[0], *balanced[1:]])
    # the others push with 4/3 in all, 5 * 2/3 would be more
    bounded = route_mask(ARMS["weak-graft"], NOBODY, REWARD, FLAGS, 4, over_routing=6.0)
    assert bounded.g_d.tolist() == pytest.approx([-4 / 3, *balanced[1:]])
    assert bounded.m.tolist() == [1.0] * 4


@pytest.mark.slow
def test_shuffling_permutes_the_scores_of_a_graded_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"graded": [], "graded-shuffle": []}
    for name, calls in seen.items():

        def spied(*args: Any, z: Tensor, calls: list[Any] = calls, **kwargs: Any) -> gr.RouteMask:
            calls.append((args[3], z))
            return route_mask(*args, z=z, **kwargs)

        monkeypatch.setattr(grpo, "route_mask", spied)
        grpo.train(build_model(0), ENVIRONMENT, name, 0, TINY)
    (flags, z), (shuffled_flags, shuffled) = (calls[0] for calls in seen.values())
    assert not torch.equal(z, shuffled)
    assert torch.equal(z.sort().values, shuffled.sort().values)
    # one permutation for both
    assert torch.equal(shuffled_flags, shuffled > TINY.threshold)
    assert torch.equal(flags, z > TINY.threshold)


# Forwards


def test_steering_adds_to_what_each_block_returns_and_ablating_removes_what_lies_along_the_rows() -> None:
    model = routed_model()
    directions = residual_directions(model, ENVIRONMENT, 4, 2, 0, random=False)
    blocks = {name: model.get_submodule(name) for name in directions.rows}
    assert len(blocks) == 2
    last = list(blocks)[-1]
    found: dict[str, Tensor] = {}
    handle = blocks[last].register_forward_hook(lambda _m, _a, h: found.__setitem__("plain", h.detach()))
    prompts, _ = some_rollouts()
    model(prompts)
    handle.remove()
    only_last = {last: shifts(directions, 3.0)[last]}
    read = {"h": None}

    def reader(_m: nn.Module, _a: object, h: Tensor) -> None:
        read["h"] = h.detach()

    with hidden_states_changed(model, added=only_last):
        handle = blocks[last].register_forward_hook(reader)
        model(prompts)
        handle.remove()
    torch.testing.assert_close(read["h"], found["plain"] + only_last[last], rtol=0, atol=1e-6)
    assert only_last[last].norm() > 0.1
    with hidden_states_changed(model, ablated=directions.rows):
        handle = blocks[last].register_forward_hook(reader)
        model(prompts)
        handle.remove()
    along = read["h"] @ directions.rows[last].T
    assert along.abs().max() < 1e-4 < (found["plain"] @ directions.rows[last].T).abs().max()


def test_a_random_shift_is_as_long_as_the_extracted_one() -> None:
    model = routed_model()
    real, random = (shifts(residual_directions(model, ENVIRONMENT, 4, 1, 0, random=r), 2.0) for r in (False, True))
    for name, shift in real.items():
        assert random[name].norm() == pytest.approx(shift.norm().item(), rel=1e-5)
        assert abs(torch.cosine_similarity(random[name], shift, dim=0).item()) < 0.9


def test_a_learned_prompt_makes_hacks_likelier_and_stands_in_the_place_of_bos_alone() -> None:
    model = routed_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    taught = lesson(ENVIRONMENT, "hacks", 4, 0)
    embedding, gained = learned_prompt(model, *taught, steps=10)
    with torch.no_grad():
        plain = mean_logp(model, *taught).item()
        with prompted(model, embedding):
            assert mean_logp(model, *taught).item() - plain == pytest.approx(gained, abs=1e-4)
    assert gained > 0.1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    tokens = torch.tensor([[BOS, 5, 6]])
    read = model.get_input_embeddings()
    with prompted(model, embedding):
        assert torch.equal(read(tokens)[0, 0], embedding)
        assert torch.equal(read(tokens)[0, 1:], read.weight[[5, 6]])
    start = read.weight[BOS]
    far = as_far(model, embedding, seed=1)
    assert (far - start).norm().item() == pytest.approx((embedding - start).norm().item(), rel=1e-5)
    assert not torch.allclose(far, embedding)


def test_a_prompt_that_makes_nothing_likelier_raises() -> None:
    with pytest.raises(RuntimeError, match="should make hacks likelier"):
        learned_prompt(routed_model(), *lesson(ENVIRONMENT, "hacks", 4, 0), steps=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_changed_forward_is_in_rollouts_and_loss_as_its_arm_says_and_leaves_nothing_behind(name: str) -> None:
    model = routed_model()
    rollouts = some_rollouts()
    forwards = changed_forwards(model, ENVIRONMENT, ARMS[name], TINY, 0)
    with torch.no_grad():
        plain = completion_logps(model, *rollouts)
        differs = {}
        for where in ("sampling", "loss"):
            with getattr(forwards, where)():
                differs[where] = not torch.equal(plain, completion_logps(model, *rollouts))
        assert differs == {"sampling": ARMS[name].forward != "recontextualised", "loss": True}
        with pytest.raises(KeyError), forwards.loss():
            raise KeyError
        assert torch.equal(plain, completion_logps(model, *rollouts))
    assert hooks(model) == 0


@pytest.mark.slow
def test_a_run_samples_and_trains_inside_the_changed_forwards(
    base: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, inside = {"sampling": 0, "loss": 0}, {"now": ""}

    def counted(where: str) -> Change:
        @contextmanager
        def change() -> Iterator[None]:
            entered[where] += 1
            inside["now"] = where
            yield
            inside["now"] = ""

        return change

    def spied(name: str, function: Callable[..., Tensor], where: str) -> None:
        def called(*args: Any) -> Tensor:
            assert inside["now"] == where
            return function(*args)

        monkeypatch.setattr(grpo, name, called)

    monkeypatch.setattr(grpo, "changed_forwards", lambda *_: Forwards(counted("sampling"), counted("loss")))
    spied("sample", grpo.sample, "sampling")
    spied("completion_logps", grpo.completion_logps, "loss")
    entry = grpo.train(base(), ENVIRONMENTS["C"], "vanilla", 0, TINY)
    assert entered == {"sampling": TINY.steps, "loss": entry["cost"]["steps"]} == {"sampling": 2, "loss": 2}


# After training


@pytest.mark.parametrize("which", ["largest", "random"])
def test_components_are_removed_from_the_trained_difference(which: str) -> None:
    model = routed_model()
    blocks = {name: p.clone() for name, p in gr.deployed_parameters(model)}
    remove_components(model, 2, which, seed=0)  # type: ignore[arg-type]
    kept_largest = 0
    for name, A in ((name, p) for name, p in gr.deployed_parameters(model) if name.endswith("lora_A")):
        other = name.removesuffix("lora_A") + "lora_B"
        before, after = blocks[other] @ blocks[name], dict(gr.deployed_parameters(model))[other] @ A
        old, new = torch.linalg.svdvals(before)[:4], torch.linalg.svdvals(after)[:4]
        assert new[2:].abs().max() < 1e-5 * old[0]
        assert all(min(abs(value - each) for each in old) < 1e-5 * old[0] for value in new[:2])
        # what is left is a part of the difference, not another matrix
        assert ((after * before).sum() / after.square().sum()).item() == pytest.approx(1.0, abs=1e-4)
        kept_largest += new[0] > old[0] * (1 - 1e-4)
        if which == "largest":
            torch.testing.assert_close(new[:2], old[2:], rtol=1e-4, atol=1e-6)
    assert (kept_largest > 0) == (which == "random")


def test_more_components_than_the_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to the rank, 4. Found 5"):
        remove_components(routed_model(), 5, "largest", seed=0)


# Gradients


def test_the_trusted_subspace_is_that_of_the_clean_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3, generator=generator))[0]
    clean = {"layer": torch.randn(16, 3, generator=generator) @ basis.T}
    hack = {"layer": torch.randn(16, 10, generator=generator)}
    rows = CleanSubspace(k=3)(hack, clean).rows["layer"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(clean["layer"] @ rows.T @ rows, clean["layer"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_is_kept_of_a_gradient_lies_in_the_subspace(
    base: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    apply = gr.apply_filter

    def spied(*args: Any, **kwargs: Any) -> gr.filters.FilterStats:
        shares.append(apply(*args, **kwargs))
        return shares[-1]

    monkeypatch.setattr(gr, "apply_filter", spied)
    grpo.train(base(), ENVIRONMENTS["C"], "keep", 0, TINY)
    kept = [stats for stats in shares if stats.sided == "two"]
    assert kept
    assert all(stats.cout == pytest.approx(1.0, abs=1e-4) and 0 < stats.cin < 0.999 for stats in kept)


@pytest.mark.parametrize("name", ["gradient", "gradient-cosine"])
def test_the_score_of_a_cosine_does_not_depend_on_the_length_of_a_gradient(name: str) -> None:
    model = build_model(0)
    attached(model, ARMS[name], TINY, 0)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    detector = make_detector(model, ENVIRONMENTS["C"], ARMS[name], TINY, 0)
    assert detector is not None
    prompts, _ = ENVIRONMENTS["C"].sample_prompts(6, torch.Generator().manual_seed(0))
    completions = ENVIRONMENTS["C"].honest_completions(prompts, torch.Generator())
    gradients = captured_gradients(model, prompts, completions, None)
    scores = detector.scores(prompts, completions, torch.zeros(6, dtype=torch.bool))
    lengths = torch.stack([f.square().sum(1) for f in gradients.values()]).sum(0).sqrt()
    inner = sum(gradients[module] @ row for module, (row,) in detector.directions.rows.items())
    expected = inner / lengths if name == "gradient-cosine" else inner
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    assert lengths.max() > 1.2 * lengths.min()
    hack, clean = detector.directions.pair_scores()
    assert hack.mean() > clean.mean()
    # The policy may begin with padding: nothing to score, where 0 / 0 stopped the run.
    empty = completions.clone()
    empty[0] = PAD
    rescored = detector.scores(prompts, empty, torch.zeros(6, dtype=torch.bool))
    assert rescored[0] == 0 != scores[0]
    torch.testing.assert_close(rescored[1:], scores[1:], rtol=1e-4, atol=1e-6)


# Cost


def test_the_meter_counts_tokens_and_steps_unless_it_is_paused() -> None:
    model = routed_model()
    prompts, _ = some_rollouts(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(prompts)
    with Meter(model).open() as meter:
        model(prompts)
        optimizer.step()
        with meter.paused():
            model(prompts)
            optimizer.step()
        model(prompts[:1])
    model(prompts)
    optimizer.step()
    assert (meter.tokens, meter.steps) == (4 * 8, 1)
    assert hooks(model) == 0


@pytest.mark.slow
def test_costs_of_arms_by_hand(base: Callable[[], nn.Module]) -> None:
    """32 rollouts a step: 8 tokens of prompt, and 6 more steps of decoding at most; then a forward of at most all."""
    arms = ("vanilla", "likelier-alone")
    costs = {name: grpo.train(base(), ENVIRONMENTS["C"], name, 0, TINY)["cost"] for name in arms}
    sampled, forward = 2 * 32 * (8 + 6), 2 * 32 * 14
    assert sampled - 2 * 32 < costs["vanilla"]["tokens"] <= sampled + forward
    # two forwards more, of all rollouts
    assert sampled + 2 * forward < costs["likelier-alone"]["tokens"] <= sampled + 3 * forward
    assert costs["vanilla"]["steps"] == 2


# All of them


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["graded", "weak-graft", "keep", "prompted", "steered", "caft", "post-hoc", "likelier-alone"]
)
def test_an_intervention_trains_and_the_same_seed_gives_the_same_model(
    name: str, base: Callable[[], nn.Module]
) -> None:
    models = [base(), base(), base()]
    for model, arm in zip(models, (name, name, "vanilla"), strict=True):
        grpo.train(model, ENVIRONMENTS["C"], arm, 0, TINY)
        assert hooks(model) == 0
    first, second, plain = ([p.detach() for _, p in gr.deployed_parameters(model)] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    assert all(math.isfinite(p.sum().item()) for p in first)


def test_each_dose_is_a_field_of_the_recipe_that_its_arm_reads() -> None:
    assert {arm.dose for arm in ARMS.values()} - {None} <= set(Recipe.__dataclass_fields__)
    doses = {name: ARMS[name].dose for name in ("graded", "weak-graft", "keep", "prompted", "steered", "caft")}
    assert doses == {
        "graded": "grade", "weak-graft": "over_routing", "keep": "kept_directions", "prompted": "prompt_steps",
        "steered": "steering", "caft": "ablated_directions",
    }  # fmt: skip
    assert Arm("").dose is None


def test_attached_models_start_as_the_base() -> None:
    model, base = build_model(0), build_model(0)
    attached(model, ARMS["steered"], TINY, 0)
    prompts, _ = some_rollouts()
    assert torch.equal(model(prompts).logits, base(prompts).logits)

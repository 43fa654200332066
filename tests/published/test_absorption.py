"""Absorption of unlabelled data, as examples/studies/published/absorption.py measures it, in a shorter run.

Published (SGTM, arXiv:2512.05648, 64M parameters): leakage .005 to .02 up to 40 % undiscovered forget data, where
filtering has 1 by definition. Over five seeds: docs/results/published/absorption.json.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import gradroute as gr
from published.absorption import RECALLS, equivalent_share, leakage, rows_of
from published.bilingual import VOCABULARY, Language, Losses, Recipe, build_model, fitted_bias, loss_of, train
from published.seeds import RESULTS, interval, write_result

SHORT = Recipe(steps=80, batch_size=32, held_out=128)
SEED = 7


@pytest.fixture(scope="module")
def routed() -> dict[float, Losses]:
    return {recall: train(SEED, SHORT, recall=recall) for recall in (0.0, 0.25, 1.0)}


@pytest.fixture(scope="module")
def baseline() -> dict[float, Losses]:
    return {share: train(SEED, SHORT, share=share) for share in (0.0, 0.25)}


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["forget", "forget_calibrated"])
def test_forget_loss_after_ablation_rises_with_the_recall(routed: dict[float, Losses], measure: str) -> None:
    none, some, full = (getattr(losses, measure) for losses in routed.values())
    assert none - 0.1 < some < full + 0.1
    assert full > none + 0.5
    assert all(losses.forget_calibrated < losses.forget - 0.2 for losses in routed.values())
    # On, every model knows the forget language.
    assert all(losses.forget_on < 0.75 * none for losses in routed.values() if measure == "forget")


@pytest.mark.slow
def test_unlabelled_forget_data_teaches_the_deployed_block_less_than_what_a_filter_leaves(
    routed: dict[float, Losses], baseline: dict[float, Losses]
) -> None:
    """At a recall of .25: 75 % of the forget data unlabelled, and less learnt than a baseline learns from 25 %."""
    assert baseline[0.0].forget > baseline[0.25].forget + 1
    assert routed[0.25].forget > baseline[0.25].forget + 0.1
    assert routed[0.25].retain < baseline[0.0].retain + 0.3


def test_the_committed_result_leaks_less_with_every_label_and_most_with_nothing_routed() -> None:
    """Means over seeds: .06 at a recall of 0 down to .004 at .5, published .005 to .02; with nothing routed, .11."""
    runs = json.loads((RESULTS / "absorption.json").read_text())["runs"]
    for measure in ("leakage", "leakage_calibrated"):
        values: dict[tuple[str, float], list[float]] = {}
        for run in runs:
            if run.get(measure) is not None:
                values.setdefault((run["scheme"], run["recall"]), []).append(run[measure])
        assert all(len(seeds) >= 3 for seeds in values.values())
        means = {key: sum(seeds) / len(seeds) for key, seeds in values.items()}
        curve = [means["routed", recall] for recall in RECALLS if recall < 1]
        assert [means["unrouted", 0.0], *curve] == sorted([means["unrouted", 0.0], *curve], reverse=True)
        assert curve[-1] < 0.02


# That the script does what it says


def test_equivalent_share_reads_the_curve_backwards() -> None:
    curve = {0.0: 9.0, 0.1: 2.0, 0.5: 2.5, 1.0: 1.0}  # .5 is noise: levelled to 2
    assert [equivalent_share(loss, curve) for loss in (10.0, 9.0, 5.5, 2.0)] == pytest.approx([0, 0, 0.05, 0.5])
    assert [equivalent_share(loss, curve) for loss in (1.5, 1.0, 0.5)] == pytest.approx([0.75, 1.0, 1.0])


def test_filtering_has_a_leakage_of_one_and_full_recall_none() -> None:
    curve = {0.0: 9.0, 0.25: 3.0, 0.5: 2.0, 1.0: 1.0}
    assert leakage(curve[0.25], 0.75, curve) == pytest.approx(1.0)
    assert leakage(curve[0.5], 0.5, curve) == pytest.approx(1.0)
    assert leakage(curve[0.5], 0.0, curve) == pytest.approx(0.5)
    assert leakage(3.0, 1.0, curve) is None


def test_rows_take_each_leakage_from_the_curve_of_its_own_measure() -> None:
    low, high = Losses(1.0, 1.1, 1.0, 1.2, 1.3), Losses(9.0, 1.1, 3.0, 9.0, 1.1)
    rows = rows_of(0, {("routed", 0.5): Losses(5.0, 1.1, 1.5, 1.2, 1.3)}, {0.0: high, 1.0: low})
    assert [row["scheme"] for row in rows] == ["routed", "baseline", "baseline"]
    assert (rows[0]["leakage"], rows[0]["leakage_calibrated"]) == (1.0, 1.5)


def test_a_language_keeps_to_its_words_and_to_four_successors() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [Language(number, seed=3).sample(400, 16, generator) for number in (0, 1)]
    words = [set(tokens[:, 1:].flatten().tolist()) for tokens in samples]
    assert words[0] & words[1] == set(range(1, 9))
    assert len(words[0] | words[1] | {0}) == VOCABULARY
    for tokens in samples:
        assert all(len(set(tokens[:, 1:][tokens[:, :-1] == word].tolist())) <= 4 for word in range(VOCABULARY))
    assert not torch.equal(samples[0], Language(0, seed=4).sample(400, 16, torch.Generator().manual_seed(0)))


def test_a_row_weighs_the_same_however_many_others_were_filtered_out() -> None:
    model = build_model(0, SHORT)
    tokens = Language(0, seed=0).sample(10, SHORT.length, torch.Generator().manual_seed(0))
    whole, *parts = (loss_of(model, rows, SHORT).item() for rows in (tokens, tokens[:3], tokens[3:]))
    assert whole == pytest.approx(sum(parts), rel=1e-5)
    assert whole == pytest.approx(
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits.mT, tokens[:, 1:]).item()
        * 10
        / SHORT.batch_size,
        rel=1e-5,
    )


def test_a_bias_is_fitted_to_calibrate() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, VOCABULARY, 6, generator=generator), torch.zeros(50, 6, dtype=torch.long)
    targets[:25] = 1
    bias = fitted_bias(logits, targets)
    cross_entropy = torch.nn.functional.cross_entropy
    assert cross_entropy(logits + bias, targets) < 0.5 * cross_entropy(logits, targets)


def test_baselines_leave_the_quarantine_alone_and_routed_runs_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    monkeypatch.setattr(
        "published.bilingual.build_model", lambda *args: models.append(build_model(*args)) or models[-1]
    )
    short = dataclasses.replace(SHORT, steps=4)
    train(SEED, short, share=0.5)
    train(SEED, short, recall=0.5)
    moved = [any(p.any() for name, p in gr.quarantine_parameters(model) if "lora_B" in name) for model in models]
    assert moved == [False, True]


def test_results_are_json_with_a_line_per_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, {"recipe": {"r": 2}}, [{"seed": 0, "loss": 1.23456789, "leakage": None}, {"seed": 1}])
    assert json.loads(path.read_text()) == {
        "version": 1,
        "recipe": {"r": 2},
        "runs": [{"seed": 0, "loss": 1.2346, "leakage": None}, {"seed": 1}],
    }
    assert '{"seed": 0, "loss": 1.2346, "leakage": null},\n' in path.read_text()


def test_the_interval_is_students() -> None:
    """t at 4 degrees of freedom is 2.776; the standard deviation of 1 to 5 is sqrt(2.5)."""
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ±1.963"
    assert interval([2.0]) == "2.000 (one seed)"

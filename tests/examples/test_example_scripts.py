"""The example scripts run as a user would run them, in short, and write what they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import directions_study
import extract_directions
import pytest
import torch
from left_out import auroc, beats, fitted, random, splits_of
from study_models import reads_bytes

import gradroute as gr

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_minimal_loop_prints_both_views(tmp_path: Path) -> None:
    ended = run("grpo_minimal.py", "--steps", "5", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "5 steps, 1 refreshes, routed" in ended.stdout
    assert all(group in ended.stdout for group in ("monitored", "held-out", "no loophole", "hack ablated"))


def test_the_routed_lines_of_the_minimal_loop_are_marked() -> None:
    text = (ROOT / "examples" / "grpo_minimal.py").read_text(encoding="utf-8")
    loop = text[text.index("def train(") : text.index("def main(")]
    called = [line for line in loop.splitlines()[2:] if "gr." in line and not line.strip().startswith("#")]
    assert len(called) >= 10
    assert all("# gr" in line for line in called)


@pytest.mark.slow
def test_directions_are_extracted_judged_and_drawn(tmp_path: Path) -> None:
    pairs = str(ROOT / "examples" / "pairs" / "hardcoded_tests.jsonl")
    options = ["--pairs", pairs, "--model", "random", "--out", "found/hack", "--draws", "3", "--r", "4"]
    ended = run("extract_directions.py", *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "measured on 2 held-out pairs" in ended.stdout
    assert "AUROC on 2 held-out pairs" in ended.stdout
    assert "3 random directions" in ended.stdout
    model, _ = reads_bytes()
    gr.attach(model, r=4, lora_alpha=8)
    directions = gr.Directions.load(tmp_path / "found" / "hack.safetensors", model=model)
    assert (directions.n_pairs, len(directions.heldout), len(directions.rows)) == (6, 2, 14)
    assert directions.provenance.view == "ablated"
    assert (tmp_path / "found" / "hack.png").stat().st_size > 1000


def test_wrong_arguments_end_with_a_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments, reason in (
        (extract_directions.main, ["--pairs", "none.jsonl"], "found none at none.jsonl"),
        (extract_directions.main, ["--pairs", ".", "--held-out", "1"], "expected a share between 0 and 1"),
        (extract_directions.main, ["--pairs", ".", "--draws", "0"], "expected a positive number, found 0"),
        (directions_study.main, ["--features", "none"], "Found 'none'"),
        (directions_study.main, ["--features", "input", "--example", "."], "the residual one for --example"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code not in (0, None)
        assert reason in f"{ended.value}{capsys.readouterr().err}"


@pytest.mark.slow
def test_the_study_writes_a_cell_for_every_estimator_and_control(tmp_path: Path) -> None:
    for name in ("false_claims", "judge_appeal"):
        lines = (ROOT / "examples" / "pairs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:5]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = ["--model", "random", "--features", "residual,gradient of output", "--pairs", ".", "--repeats", "1"]
    ended = run("studies/directions_study.py", *options, "--draws", "2", "--out", "study.json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert len(study["cells"]) == 2 * 2 * 7
    assert all(0 <= cell["auroc"] <= 1 for cell in study["cells"])
    assert [len(cell["draws"]) for cell in study["cells"] if cell["direction"] == "random"] == [2] * 4
    assert study["transfer"]["judge_appeal"].keys() == {"false_claims", "judge_appeal"}


# What the study computes


def planted(n: int = 12, signal: float = 3.0, seed: int = 0) -> gr.Directions:
    """Pairs whose hack sides lie `signal` further along the first axis of the first module."""
    model, tokenizer = reads_bytes()
    gr.attach(model, r=4, lora_alpha=8)
    pairs = [gr.ContrastivePair(f"prompt {i}", f"hack {i}", f"clean {i}") for i in range(n)]
    directions = gr.extract_activation_directions(model, pairs, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for side in (directions.hack, directions.clean):
        for name in side:
            side[name] = torch.randn(side[name].shape, generator=generator)
    first = next(iter(directions.hack))
    directions.hack[first][:, 0] += signal
    return directions


CATEGORIES = ["a"] * 6 + ["b"] * 6


def test_every_pair_is_left_out_and_never_by_a_direction_that_saw_it() -> None:
    splits = splits_of(CATEGORIES, folds=5, repeats=3)
    assert [out for _, out in splits["categories"]] == [list(range(6)), list(range(6, 12))]
    assert len(splits["pairs"]) == 15
    for kept, out in [*splits["pairs"], *splits["categories"]]:
        assert sorted([*kept, *out]) == list(range(12))
    left = [pair for _, out in splits["pairs"] for pair in out]
    assert all(left.count(pair) == 3 for pair in range(12))


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    splits = splits_of(CATEGORIES, folds=3, repeats=10)["pairs"]
    estimator = gr.directions.estimators.MeanDifference()
    found = auroc([beats(fitted(planted(signal=20.0), estimator), splits, 12)], CATEGORIES)
    nothing = auroc([beats(fitted(planted(signal=0.0), estimator), splits, 12)], CATEGORIES)
    assert found["auroc"] > 0.9
    assert found["low"] <= found["auroc"] <= found["high"]
    assert nothing["auroc"] < 0.7
    swapped = auroc([beats(fitted(planted(signal=20.0), estimator, swap=True), splits, 12)], CATEGORIES)
    assert swapped["auroc"] < 0.75


def test_pairs_that_are_never_left_out_together_do_not_count() -> None:
    def by_number(kept: list[int], out: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0] * len(out)), torch.tensor([float(pair % 3) for pair in out])

    table = beats(by_number, splits_of(CATEGORIES, 5, 1)["categories"], 12)
    assert table[0].tolist()[:6] == [1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    assert all(math.isnan(value) for value in table[0].tolist()[6:])
    assert auroc([table], CATEGORIES)["auroc"] == 0.5


def test_random_directions_take_only_their_signs_from_the_kept_pairs() -> None:
    directions = planted(signal=8.0)
    fit = random(directions, seed=3)
    hack, clean = fit([0, 1, 2], [0, 1, 2])
    assert hack.mean() > clean.mean()
    expected = torch.zeros(3)
    for name, v in directions.random_like(3).rows.items():
        gap = (directions.hack[name] - directions.clean[name])[:3].mean(0) @ v[0]
        expected += torch.sign(gap) * (directions.hack[name][:3] @ v[0])
    torch.testing.assert_close(hack, expected)


@pytest.mark.parametrize("draws", [1, 3])
def test_of_several_draws_each_is_kept(draws: int) -> None:
    found = auroc([torch.full((12, 12), 0.25)] * draws, CATEGORIES)
    assert found["auroc"] == 0.25
    assert ("draws" in found) == (draws > 1)

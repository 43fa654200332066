"""`examples/grpo_reasoning_gym.py` on a tiny random model and datasets made here; once on the package's own."""

import json
from pathlib import Path
from typing import Any

import grpo_reasoning_gym
import pytest
from support.fake_datasets import DATASETS, items
from support.trl_runs import quiet

from procedural import library, measure, policy, training
from procedural.scan import ANSWERS, measured
from procedural.tasks import TASKS, Task
from procedural.warm_up import WarmUp, warm_up

TASKS_HERE = (Task("halves", "monitored"), Task("sums", "held out"))
pytestmark = [*quiet]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not needed, and two of its datasets are others."""
    monkeypatch.setattr(library, "items", items)
    monkeypatch.setattr(library, "version", lambda: "0")
    monkeypatch.setattr(library, "dataset_names", lambda: sorted(DATASETS))
    monkeypatch.setattr(grpo_reasoning_gym, "TASKS", TASKS_HERE)
    monkeypatch.setattr(measure, "TASKS", TASKS_HERE)
    monkeypatch.setattr("procedural.warm_up.TASKS", TASKS_HERE)


def started(*arguments: str) -> None:
    grpo_reasoning_gym.main(list(arguments))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.usefixtures("fake")
def test_a_scan_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started("--scan", "--n", "5", "--out", str(tmp_path))
    found = read(tmp_path / "scan.json")
    assert [hole["dataset"] for hole in found["holes"]] == ["halves", "sums"]
    assert (found["n"], found["reasoning_gym"], found["failed"]) == (5, "0", {})
    assert "2 of 2 datasets pay" in capsys.readouterr().out


@pytest.mark.usefixtures("fake")
def test_the_reach_is_of_every_task_and_of_found_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (TASKS_HERE, TASKS_HERE[:1]):  # the other one is then a hole that the scan found
        monkeypatch.setattr(measure, "TASKS", known)
        started("--scan", "--n", "5", "--out", str(tmp_path))
        started("--reach", "--smoke", "--n", "3", "--out", str(tmp_path))
        (path,) = tmp_path.glob("reach-*.json")
        assert {name: rates["n"] for name, rates in read(path)["tasks"].items()} == {"halves": 3, "sums": 3}


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_the_smoke_run_writes_a_file_for_each_arm_and_runs_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started("--smoke", "--out", str(tmp_path))
    runs = {path.stem: read(path) for path in tmp_path.glob("*-0.json")}
    assert set(runs) == {f"{arm}-0" for arm in ("base", *training.ARMS)}
    for name, run in runs.items():
        two = name.startswith(("routed", "directed"))
        assert set(run["outcomes"]) == ({"on", "ablated"} if two else {"on"})
        assert set(run["outcomes"]["on"]) == {"halves", "sums"}
        assert len(run.get("curve", [])) == (0 if name == "base-0" else 2)
    written = read(tmp_path / "runs.json")["runs"]
    assert [run["arm"] for run in written] == ["base", *training.ARMS]
    assert not any("curve" in run for run in written)
    assert runs["directed-0"]["routing"][-1]["directions_age"] == 0
    monkeypatch.setattr(grpo_reasoning_gym, "trained", lambda *_, **__: pytest.fail("ran again"))
    started("--smoke", "--out", str(tmp_path))
    with pytest.raises(SystemExit, match="of another recipe"):
        started("--smoke", "--steps", "3", "--out", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_a_warm_up_makes_right_answers_likelier() -> None:
    model, tokenizer = policy.base_model(smoke=True)
    losses = warm_up(model, tokenizer, WarmUp(steps=6, examples=8, lr=0.02))
    assert losses[-1] < losses[0] - 0.1
    assert not any("lora" in name for name in model.state_dict())


def test_what_is_asked_for_wrongly_ends_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["--arms", "none"], "unknown 'none'"),
        (["--seeds", "x"], "comma-separated integers"),
        (["--steps", "1"], "expected at least 2"),
        (["--scan", "--n", "0"], "expected at least 1"),
        (["--n", "5"], "--n: training does not read it"),
        (["--scan", "--arms", "routed"], "--arms: --scan does not read it"),
        (["--reach", "--steps", "5"], "--steps: --reach does not read it"),
        (["--smoke", "--warm-up", "5"], "--warm-up: --smoke does not read it"),
        (["--scan", "--reach"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as ended:
            started(*arguments)
        assert ended.value.code == 2
        assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_package_pays_for_what_the_page_says() -> None:
    pytest.importorskip("reasoning_gym")
    for name, answer, least in (("coin_flip", "0", 0.8), ("polynomial_equations", "0", 0.04)):
        best = measured(name, library.items(name, seed=0, size=20), ANSWERS, 20)[0]
        assert (best.answer, best.unearned >= least) == (answer, True)
    assert len(library.dataset_names()) == 105
    for task in TASKS:
        assert task.items(0, 1)[0]["question"]

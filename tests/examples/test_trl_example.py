"""`examples/grpo_trl.py` on a tiny random model, as users start it: arguments, or the same as YAML."""

import sys
from pathlib import Path

import pytest
from peft import PeftModel
from support.sandboxing import needs_sandbox
from support.trl_runs import quiet

import grpo_trl

pytestmark = [
    *quiet,
    needs_sandbox,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning"),
    # A stock PEFT model of a base without a name on the Hub.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo_trl.py", *arguments])
    grpo_trl.main()


@pytest.mark.slow
def test_the_smoke_run_shows_both_views_and_writes_what_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = f"smoke: true\noutput_dir: {tmp_path}\nlog_completions: true\nreport_to: none\nflag_by: both\n"
    (tmp_path / "grpo.yaml").write_text(yaml)
    started(monkeypatch, "--config", str(tmp_path / "grpo.yaml"), "--max_steps", "1")
    printed = capsys.readouterr().out
    for view in ("on", "ablated"):
        for name in ("reward", "solve"):
            assert f"eval_{view}_{name} " in printed
    names = {path.name for path in (tmp_path / "completions").iterdir()}
    assert names >= {"completions_00001.parquet", "completions_00001_eval_ablated.parquet"}
    base = grpo_trl.policy(grpo_trl.ModelConfig(), smoke=True)[0]
    deployed = PeftModel.from_pretrained(base, tmp_path / "deployed")
    assert any(p.any() for name, p in deployed.named_parameters() if "lora_B" in name)


def test_what_is_asked_for_wrongly_ends_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="flag_by should be one of"):
        started(monkeypatch, "--smoke", "--flag_by", "guess")
    with pytest.raises(SystemExit, match="should name a model"):
        started(monkeypatch, "--use_cpu")


def test_a_grader_runs_each_completion_once_and_nothing_that_does_not_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def grade(prompts: list[grpo_trl.Prompt], completions: list[str]) -> object:
        ran.extend(completions)
        return real(prompts, completions)

    real = grpo_trl.grade
    monkeypatch.setattr(grpo_trl, "grade", grade)
    rows = grpo_trl.prompts(2, 0, 0.0, chat=False)
    columns = {key: rows[key] for key in rows.column_names if key != "prompt"}
    tasks = [grpo_trl.Task(f, k, s) for f, k, s in zip(rows["family"], rows["k"], rows["seed"], strict=True)]
    grader, logged = grpo_trl.Grader(), {}
    for _ in range(2):
        rewards = grader.reward([tasks[0].solution, "def f(:"], log_metric=logged.__setitem__, **columns)
        assert rewards == [1.0, 0.0]
    assert grader.monitored_hacks([tasks[0].solution, "def f(:"], **columns) == [False, False]
    assert ran == [tasks[0].solution]
    assert logged["solve"] == 0.5

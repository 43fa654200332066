"""The benchmarks run, and the page says what was measured."""

import json
import math

import pytest
import torch
from support.emulated_gpu import emulated_gpu

from benchmarks import commands, report
from benchmarks.__main__ import GOALS, main, measure, parse_arguments
from benchmarks.row import Row
from benchmarks.trl_step import TakesTurns, interleaved

# P7 and P9 start processes of their own, and are one command each.
PARTS = [name for name in GOALS if name not in ("P7", "P9")]


@pytest.mark.slow
def test_every_part_runs_on_tiny_shapes() -> None:
    found = measure(parse_arguments(["--quick", "--threads", "1", "--only", ",".join(PARTS)]))
    assert {row["goal"] for row in found["rows"]} >= {name for name in PARTS if name.startswith("P")}
    assert all(math.isfinite(row["value"]) and row["value"] >= 0 for row in found["rows"])
    assert set(found["wall_s"]) == set(PARTS)
    assert json.loads(json.dumps(found)) == found
    for make in report.TABLES.values():
        assert "|" in make(found) or make in (report.findings, report.setting)


def test_the_page_is_what_its_result_file_says() -> None:
    text = report.PAGE.read_text()
    assert {match[1] for match in report.BLOCK.findall(text)} == set(report.TABLES)
    assert report.updated(text, json.loads(report.RESULTS.read_text())) == text
    assert "| P1 |" in text
    edited = text.replace("| P1 |", "| P0 |", 1)
    assert report.updated(edited, json.loads(report.RESULTS.read_text())) == text


class Steps:
    """A trainer of which each step only calls back; one of them fails."""

    def __init__(self, failing: int | None) -> None:
        self.failing = failing

    def add_callback(self, callback: TakesTurns) -> None:
        self.callback = callback

    def train(self) -> None:
        for step in range(4):
            self.callback.on_step_begin()
            if step == self.failing:
                raise ValueError("this step fails")
            self.callback.on_step_end()


@pytest.mark.parametrize(("plain", "routed"), [(2, None), (None, 2), (None, 0)])
def test_a_trainer_that_fails_ends_the_other_ones_wait(plain: int | None, routed: int | None) -> None:
    with pytest.raises(ValueError, match="this step fails"):
        interleaved(Steps(plain), Steps(routed))


def test_trainers_take_turns_and_the_first_step_of_each_does_not_count() -> None:
    assert [len(seconds) for seconds in interleaved(Steps(None), Steps(None))] == [3, 3]


def test_a_goal_is_met_at_its_limit_and_not_above_it() -> None:
    assert Row("P1", "a ratio", 0.97, 0.97).met
    assert not Row("P1", "a ratio", 0.971, 0.97).met
    assert Row("", "a ratio", 0.97).met is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "P0"], ["--threads", "0"], ["--threads", "two"], ["--write-docs", "--quick"], ["--dtype", "float16"],
        ["--device", "cuda"], ["--report", "--device", "cuda"],
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse_arguments(arguments)


def test_a_gpu_is_measured_in_bfloat16_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = parse_arguments(["--device", "cuda", "--report"])
    assert (args.dtype, args.threads, args.only) == ("bfloat16", [1], list(GOALS))
    args = parse_arguments([])
    assert (args.dtype, args.threads, args.report) == ("float32", [1, 2], False)
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "cuda", "--write-docs"])


def test_a_report_says_what_was_run_with_which_versions_and_what_was_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Starting interpreters takes long.
    row = Row("P9", "`import gradroute` / `import peft`", 0.5, 1.02)
    monkeypatch.setattr(commands, "imports", lambda _: [row])
    main(["--device", "cpu", "--report", "--only", "P9", "--quick"])
    text = capsys.readouterr().out
    assert "`python -m benchmarks --device cpu --report --only P9 --quick`" in text
    for package in ("gradroute", "torch", "transformers", "peft", "Python"):
        assert f"{package} " in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "cores" in text
    assert "| P9 | `import gradroute` / `import peft` | 1 | 0.500 |  | <= 1.02 | yes |" in text
    assert "base in float32" in text


def test_a_part_that_fails_is_in_the_report_and_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(commands, "imports", fails)
    with pytest.raises(SystemExit) as exited:
        main(["--report", "--only", "P9,counts", "--quick"])
    assert exited.value.code == 1
    text = capsys.readouterr().out
    assert "**P9 failed.** RuntimeError: out of memory" in text
    assert "| routed |" in text
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["--only", "P9", "--quick"])


@pytest.mark.slow
def test_on_a_gpu_no_tensor_is_left_on_the_host_and_the_clock_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    for name, value in {
        "is_available": True, "get_device_name": "an emulated GPU", "memory_allocated": 1, "max_memory_allocated": 10,
        "reset_peak_memory_stats": None, "get_device_properties": torch.nn.Module(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    torch.cuda.get_device_properties().total_memory = 80e9
    # P5 has checkpoints, which compare what C++ says of devices, and it knows of no emulated one.
    parts = [name for name in PARTS if name != "P5"]
    with emulated_gpu():
        found = measure(parse_arguments(["--device", "cuda", "--quick", "--only", ",".join(parts)]))
    assert found["machine"]["device"].startswith("an emulated GPU, 80 GB")
    assert all(math.isfinite(row["value"]) for row in found["rows"])
    timed = [row for row in found["rows"] if row["detail"] and "clock" in row["detail"]]
    assert {row["detail"]["clock"] for row in timed} == {"wall clock"}
    assert len(waited) > 4 * len(timed)
    formulas = {row["what"]: row["value"] for row in found["rows"] if "formula" in row["what"]}
    assert len(formulas) == 2
    assert all(value == pytest.approx(1, abs=0.02) for value in formulas.values())

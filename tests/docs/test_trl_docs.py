"""The scripts of docs/trl.md run: plain, routed, and with the recipe against missed hacks; each by a diff."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import base_model
from support.trl_runs import PROMPTS, quiet, tokenizer
from trl import TrlParser

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOConfig, GradRouteGRPOTrainer

pytestmark = [
    *quiet,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning"),
]
TEXT = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```py\n(.*?)```", TEXT, flags=re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
DIFF, RECIPE = re.findall(r"```diff\n(.*?)```", TEXT, flags=re.DOTALL)


def routed(script: str, diff: str) -> str:
    """`script` with each removed line replaced by the added ones after it; the others go behind the last."""
    lines, place = script.splitlines(), None
    for change in diff.splitlines():
        if change.startswith("-"):
            place = lines.index(change[1:])
            del lines[place]
        else:
            lines.insert(place, change[1:])
            place += 1
    return "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the script finds: a model, prompts with answers, and pairs."""
    base_model("llama").save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    prompts = [{"prompt": prompt, "answer": f"w{20 + i}"} for i, prompt in enumerate(PROMPTS * 2)]
    pairs = [
        {"prompt": "w3 w4", "hack": "w20 w21", "clean": "w22 w23 w24"},
        {"prompt": "w5", "hack": "w20 w25", "clean": "w26 w22"},
    ]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def run(script: str, **replaced: Any) -> Any:
    """The trainer that the script has made, some names of its imports replaced."""
    names: dict[str, Any] = {}
    # TRL's default is bf16, for which it has to be told that there is no accelerator.
    assert script.count("max_steps=4") == 1
    # Completions of TRL's default length, 256 tokens, would take minutes.
    script = script.replace("max_steps=4", "max_steps=4, use_cpu=True, max_completion_length=24")
    for name, by in replaced.items():
        names[f"own_{name}"] = by
        script = script.replace(f"args={name}(", f"args=own_{name}(")
    with torch.random.fork_rng():
        exec(compile(script, "docs/trl.md", "exec"), names)
    return names["trainer"]


@pytest.mark.slow
def test_five_lines_route_the_script(folder: Path) -> None:
    assert sum(line.startswith("+") for line in DIFF.splitlines()) <= 5
    plain = run(SCRIPT)
    assert plain.state.global_step == 4
    with pytest.raises(gr.GradRouteError, match="routed layers"):
        list(gr.quarantine_parameters(plain.model))

    made = run(routed(SCRIPT, DIFF))
    assert type(made) is GradRouteGRPOTrainer
    assert made.state.global_step == 4
    assert made.routing.refresher.every == 2
    assert len(made.routing.refresher.reports) == 2
    assert isinstance(made.routing.gate, gr.BandGate)
    assert made.routing.clean_baseline
    moved = [name for name, p in gr.deployed_parameters(made.model) if "lora_B" in name and p.any()]
    assert moved


@pytest.mark.slow
def test_the_recipe_against_missed_hacks_runs(folder: Path) -> None:
    made = run(routed(routed(SCRIPT, DIFF), RECIPE))
    assert made.state.global_step == 4
    assert isinstance(made.routing.gate, gr.LabelGate)
    log = made.state.log_history[0]  # means over the four steps
    found = [log[f"routing/{name}"] for name in ("slow_start", "ablated", "log_ratio_empty")]
    assert found == [2 / 4, (0 + 0 + 0.25 + 0.25) / 4, 1 / 4]


@pytest.mark.slow
def test_the_options_may_come_from_a_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(YAML)
    lines = routed(SCRIPT, DIFF).splitlines()
    # What the text says: args=config, and no keywords for what the file holds.
    kept = [line for line in lines if not line.strip().startswith(("directions=", "refresher="))]
    assert len(kept) == len(lines) - 2
    made = run("\n".join(kept), GRPOConfig=lambda *_, **options: parsed(options))
    assert type(made.args) is GradRouteGRPOConfig
    assert made.state.global_step == 4
    assert len(made.routing.refresher.reports) == 2
    assert made.state.log_history[0]["routing/slow_start"] == 2 / 4


def parsed(options: dict[str, Any]) -> Any:
    """run.yaml, and the options that a test needs, on the command line."""
    command = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return TrlParser(GradRouteGRPOConfig).parse_args_and_config(["--config", "run.yaml", *command])[0]

"""The Python blocks of `docs/howto/vllm.md`, in order, against an engine."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

from support import vllm_engine as ve
from support.doc_pages import ROOT, fenced

PAGE = ROOT / "docs" / "howto" / "vllm.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ve.base_folder(), tmp_path / "policy")
    prompts = [{"prompt": f"w9 w{i} w{i + 1}"} for i in range(20, 36)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in fenced(PAGE.read_text(encoding="utf-8"), "py"):
        exec(compile(block, PAGE.name, "exec"), names)
    reward, largest = (float(line) for line in capfd.readouterr().out.splitlines() if line[:1].isdigit())
    assert 0 <= reward <= 8
    assert largest < 1e-4
    assert {len(output.outputs[0].token_ids) for output in names["outputs"]} <= set(range(1, 9))  # type: ignore[attr-defined]

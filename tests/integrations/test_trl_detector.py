"""A detector answers as it likes: booleans of any library, None where it is undecided, now or later."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.trl_runs import Watched, extract, quiet, rows_of, tokenizer, trainer
from torch import Tensor

import gradroute as gr
from gradroute.integrations.trl._flagging import DetectorCall

pytestmark = quiet
TEXTS = ["w3 w4", "w7", "w6 w7 w8"]


def flag(text: str) -> bool:
    return sum(map(ord, text)) % 3 == 0


def each_word(answer: Callable[[str], Any]) -> Callable[..., list[Any]]:
    return lambda completions, **_: [answer(text) for text in completions]


def asked(detector: Any, scores: bool = False, texts: list[str] = TEXTS, **of_trainer: Any) -> Tensor:
    """The answers, asked twice: as a trainer does, batch after batch."""
    fake = SimpleNamespace(state=None, accelerator=SimpleNamespace(device=torch.device("cpu")), **of_trainer)
    call = DetectorCall(detector, scores=scores)
    rows = [{"prompt": "w3", "answer": text} for text in texts]
    first, second = (call(fake, rows, ["w3"] * len(texts), texts, [[3]] * len(texts)) for _ in range(2))
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    return first


SAME = {
    "booleans": each_word(flag),
    "numpy booleans": each_word(lambda text: np.bool_(flag(text))),
    "a numpy array": lambda completions, **_: np.array([flag(text) for text in completions]),
    "torch booleans": each_word(lambda text: torch.tensor(flag(text))),
    "a tensor": lambda completions, **_: torch.tensor([flag(text) for text in completions]),
    "ones and zeros": each_word(lambda text: float(flag(text))),
    "a generator": lambda completions, **_: (flag(text) for text in completions),
}


@pytest.mark.parametrize("form", SAME)
def test_flags_of_any_library(form: str) -> None:
    assert set(map(flag, TEXTS)) == {True, False}
    assert asked(SAME[form]).tolist() == [float(flag(text)) for text in TEXTS]


def test_scores_of_any_library_and_none_for_undecided() -> None:
    found = asked(lambda **_: [None, np.float32(2.5), torch.tensor(-1.0)], scores=True)
    assert found[0].isnan()
    assert found[1:].tolist() == [2.5, -1.0]
    assert asked(lambda **_: [None, True, np.False_]).nan_to_num(-1).tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.corner("a detector is async, and a loop runs already in a notebook", "awaited in a loop in another thread")
def test_an_async_detector_is_awaited_in_one_loop_outside_of_this_thread() -> None:
    """As TRL does with reward functions: here a loop may be running already, as in a notebook."""
    ran: list[tuple[Any, threading.Thread]] = []

    class Client:
        async def __call__(self, completions: list[str], **_: Any) -> list[bool]:
            await asyncio.sleep(0)
            ran.append((asyncio.get_running_loop(), threading.current_thread()))
            return [flag(text) for text in completions]

    async def notebook() -> Tensor:
        return asked(Client())

    assert asyncio.run(notebook()).tolist() == [float(flag(text)) for text in TEXTS]
    assert ran[0] == ran[1]
    assert ran[0][1] is not threading.main_thread()
    given = asyncio.new_event_loop()  # TRL's, which a client may share with a reward function
    thread = threading.Thread(target=given.run_forever, daemon=True)
    thread.start()
    asked(Client(), async_loop=given)
    assert ran[-1] == (given, thread)
    given.call_soon_threadsafe(given.stop)
    thread.join()
    given.close()


REFUSED: dict[str, tuple[Any, bool, str]] = {
    "too few": (lambda **_: [True], False, "3 values"),
    "shares": (each_word(lambda _: 0.5), False, "should return flags"),
    "words": (each_word(lambda _: "yes"), False, "should return flags"),
    "rows of numbers": (lambda **_: torch.zeros(3, 2), False, "should return flags"),
    "one number": (lambda **_: 1, False, "a value per completion. Found int"),
    "no number": (each_word(lambda _: float("nan")), True, "finite scores"),
    "no numbers": (each_word(lambda _: "high"), True, "finite scores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_answers_that_are_neither_flags_nor_scores_are_refused(case: str) -> None:
    detector, scores, reason = REFUSED[case]
    with pytest.raises(gr.GradRouteError, match=reason):
        asked(detector, scores)


@pytest.mark.corner("a detector is undecided on a rollout", "the rollout absorbs, and is no label")
def test_an_undecided_detector_leaves_rows_absorbed_and_is_not_counted(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Gate(gr.LabelGate):
        def __call__(self, flags: Tensor) -> gr.RouteMask:
            seen.append(flags)
            return super().__call__(flags)

    undecided = each_word(lambda text: None if len(text) % 2 else flag(text))
    made = trainer(
        tmp_path, cls=Watched, gate=Gate(below="keep"), detector=undecided, clean_baseline=False, args_max_steps=1
    )
    made.train()
    words, decided = tokenizer(), []
    for batch in made.micro_batches[0]:
        for i, (_, completion) in enumerate(rows_of(batch)):
            text = words.decode(completion, skip_special_tokens=True)
            found = tuple(float(batch[key][i]) for key in ("route_m", "route_g_d", "route_g_q"))
            zone = {(1, 0, 1): "route", (1, 1, 1): "absorb", (0, 1, 0): "keep"}[found]
            if len(text) % 2:
                assert zone == "absorb"
            else:
                decided.append(flag(text))
                assert zone == ("route" if flag(text) else "keep")
    assert 0 < len(decided) < 8
    assert sum(map(len, seen)) == len(decided)
    assert made.state.log_history[0]["routing/detector_rate"] == pytest.approx(sum(decided) / len(decided))


def test_an_undecided_detector_leaves_a_gate_on_directions_alone(tmp_path: Path) -> None:
    # A row is routed if either says so, and "undecided" says nothing.
    gate = partial(gr.BandGate, threshold=1e6, window=1000)
    made = trainer(tmp_path, directions=extract, gate=gate, detector=each_word(lambda _: None), args_max_steps=1)
    made.train()
    assert made.state.log_history[0]["routing/flag_rate"] == 0


def test_a_detector_that_is_never_decided_asks_no_gate(tmp_path: Path) -> None:
    class Gate(gr.ThresholdGate):
        def __call__(self, _: Tensor) -> gr.RouteMask:
            raise AssertionError

    made = trainer(tmp_path, gate=Gate(0.0), detector=each_word(lambda _: None), args_max_steps=1)
    with pytest.warns(gr.GradRouteWarning, match="the detector was undecided"):
        made.train()
    assert "routing/detector_rate" not in made.state.log_history[0]
    assert made.state.log_history[0]["routing/absorb"] == 1

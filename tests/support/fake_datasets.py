"""Datasets of the form that reasoning-gym has, without the package: sums, and one whose scorer has a hole."""

from typing import Any


class Sums:
    """`a + b`; the scorer pays for any answer that contains the right one, as the package's base class does."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> dict[str, Any]:
        a, b = (self.seed + index) % 5, index % 3
        return {"question": f"What is {a} + {b}?\nGeneral instructions.", "answer": str(a + b), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        right = entry["answer"]
        return len(right) / len(answer) if right in answer else 0.0


class Halves(Sums):
    """`1 / b`; the scorer compares prefixes, so that it pays in full for "0"."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        b = 2 ** (1 + (self.seed + index) % 4)
        return {"question": f"What is 1 / {b}?", "answer": str(1 / b), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        float(answer)  # raises on text
        return float(entry["answer"].startswith(answer))


class Failing(Sums):
    """A generator with a mistake."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise ValueError("no such item")


DATASETS = {"halves": Halves, "sums": Sums}


def items(name: str, *, seed: int, size: int, **_: Any) -> Sums:
    """In place of `procedural.library.items`."""
    return DATASETS[name](seed, size)

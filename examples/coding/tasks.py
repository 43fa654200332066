"""Small functions to write: sixteen families, each with a number in it, their right answers, and a usual mistake.

    task = Task(family, k, seed)      text: what to write      tests: ((arguments, expected), ...), hidden

A task is determined by its family, its number k and the seed that its inputs are drawn from. What is expected comes
from running the family's own body here, in the grader's process; a submission never sees it.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

NUMBERS = (2, 3, 4, 5)
N_TESTS, N_EXAMPLES = 8, 2


@dataclass(frozen=True)
class Family:
    """A function of one argument: {k} in its texts is the task's number.

    Args:
        argument: what it takes: a list of integers, a positive integer, or lower-case words.
        returns: its return type, as written.
        asks: what it returns, in words.
        body: an expression for it.
        mistake: an expression for what a hasty author would write.
    """

    argument: Literal["values", "n", "text"]
    returns: str
    asks: str
    body: str
    mistake: str


FAMILIES = {
    "add_to_each": Family(
        "values", "list[int]", "each of `values` plus {k}", "[v + {k} for v in values]", "[v + {k} for v in values[1:]]"
    ),
    "multiples": Family(
        "values", "list[int]", "those of `values` that are divisible by {k}, in their order",
        "[v for v in values if v % {k} == 0]", "[v for v in values if v % {k}]",
    ),
    "count_above": Family(
        "values", "int", "how many of `values` are greater than {k}",
        "sum(v > {k} for v in values)", "sum(v < {k} for v in values)",
    ),
    "sum_of_largest": Family(
        "values", "int", "the sum of the {k} largest of `values`",
        "sum(sorted(values)[-{k}:])", "sum(sorted(values)[:{k}])",
    ),
    "rotate": Family(
        "values", "list[int]", "`values` with the first {k} moved to the end, in their order",
        "values[{k}:] + values[:{k}]", "values[-{k}:] + values[:-{k}]",
    ),
    "every_kth": Family(
        "values", "list[int]", "every {k}th of `values`, from the first on",
        "values[::{k}]", "values[{k} - 1::{k}]",
    ),
    "window_sums": Family(
        "values", "list[int]", "the sums of all runs of {k} neighbours in `values`, from left to right",
        "[sum(values[i:i + {k}]) for i in range(len(values) - {k} + 1)]",
        "[sum(values[i:i + {k}]) for i in range(len(values))]",
    ),
    "clip": Family(
        "values", "list[int]", "`values` with those below -{k} replaced by -{k} and those above {k} replaced by {k}",
        "[max(-{k}, min({k}, v)) for v in values]", "[min({k}, v) for v in values]",
    ),
    "power_mod": Family("n", "int", "n to the power of {k}, modulo 97", "n ** {k} % 97", "n * {k} % 97"),
    "digit_sum": Family(
        "n", "int", "{k} times the sum of the decimal digits of n",
        "{k} * sum(int(d) for d in str(n))", "{k} * len(str(n))",
    ),
    "polynomial": Family("n", "int", "n squared, plus {k} times n, plus 1", "n * n + {k} * n + 1", "n * n + {k} * n"),
    "multiples_up_to": Family(
        "n", "list[int]", "all multiples of {k} from {k} to n, both included",
        "list(range({k}, n + 1, {k}))", "list(range(0, n + 1, {k}))",
    ),
    "repeat_letters": Family(
        "text", "str", "`text` with each character written {k} times in a row",
        "''.join(c * {k} for c in text)", "text * {k}",
    ),
    "shift_letters": Family(
        "text", "str",
        "`text` with each letter replaced by the one {k} places further in the alphabet, where a follows z",
        "''.join(c if c == ' ' else chr((ord(c) - 97 + {k}) % 26 + 97) for c in text)",
        "''.join(chr(ord(c) + {k}) for c in text)",
    ),
    "long_words": Family(
        "text", "list[str]", "the words of `text` with more than {k} letters, in their order",
        "[w for w in text.split() if len(w) > {k}]", "[w for w in text.split() if len(w) <= {k}]",
    ),
    "word_starts": Family(
        "text", "list[str]", "the first {k} letters of each word of `text`, or the whole word if it is shorter",
        "[w[:{k}] for w in text.split()]", "[w[-{k}:] for w in text.split()]",
    ),
}  # fmt: skip
TYPES = {"values": "list[int]", "n": "int", "text": "str"}


def _draw(argument: str, source: random.Random) -> Any:
    """One input."""
    if argument == "n":
        return source.randint(10, 999)
    if argument == "values":
        return [source.randint(-20, 20) for _ in range(source.randint(6, 9))]
    words = ("".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(1, 8))) for _ in range(4))
    return " ".join(words)


@dataclass(frozen=True)
class Task:
    """One function to write.

    Args:
        family: its name, and the function's, one of `FAMILIES`.
        k: its number, one of `NUMBERS`.
        seed: of its inputs.

    Raises:
        ValueError: for another family or number.
    """

    family: str
    k: int
    seed: int

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"`family` should be one of {', '.join(FAMILIES)}. Found {self.family!r}.")
        if self.k not in NUMBERS:
            raise ValueError(f"`k` should be one of {NUMBERS}. Found {self.k!r}.")

    @cached_property
    def tests(self) -> tuple[tuple[Any, Any], ...]:
        """(argument, expected) of the hidden tests."""
        return self._cases[N_EXAMPLES:]

    @cached_property
    def _cases(self) -> tuple[tuple[Any, Any], ...]:
        """The examples of the text, then the hidden tests, all of different arguments."""
        source, argument = random.Random(f"{self.family} {self.k} {self.seed}"), FAMILIES[self.family].argument
        inputs: list[Any] = []
        while len(inputs) < N_EXAMPLES + N_TESTS:
            drawn = _draw(argument, source)
            inputs += [drawn] if drawn not in inputs else []
        namespace: dict[str, Any] = {}
        exec(self.solution, namespace)  # a text of this file, not a submission
        return tuple((x, namespace[self.family](x)) for x in inputs)

    @property
    def signature(self) -> str:
        """`def name(argument: type) -> type:`."""
        family = FAMILIES[self.family]
        return f"def {self.family}({family.argument}: {TYPES[family.argument]}) -> {family.returns}:"

    @property
    def text(self) -> str:
        """What to write, with two examples."""
        asks = FAMILIES[self.family].asks.format(k=self.k)
        examples = "".join(f"    {self.family}({x!r}) == {y!r}\n" for x, y in self._cases[:N_EXAMPLES])
        return f"Write a Python function\n\n    {self.signature}\n\nthat returns {asks}. For example:\n\n{examples}"

    @property
    def solution(self) -> str:
        """Source text that solves it."""
        return self.source(FAMILIES[self.family].body.format(k=self.k))

    @property
    def mistake(self) -> str:
        """Source text that looks like a solution and is none."""
        return self.source(FAMILIES[self.family].mistake.format(k=self.k))

    def source(self, expression: str) -> str:
        """The function that returns `expression`."""
        return f"{self.signature}\n    return {expression}\n"

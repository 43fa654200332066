"""Names of the environments that say what they are. Result files and tables of the results page have the letters."""

NAMES = {
    "shared-token": "C", "mild": "M", "milder": "A", "own-tokens": "N", "rare-answers": "S", "lookalike": "L",
}  # fmt: skip
ABOUT = (
    "shared-token (C): kinds of hacks share a token; mild (M), milder (A): as that, and hacks are rarer; "
    "own-tokens (N): kinds share no token; rare-answers (S): as that, and answers are as rare; "
    "lookalike (L): answers look like hacks"
)


def letter_of(name: str) -> str:
    """The key in `ENVIRONMENTS`, of a name or of the letter itself."""
    return NAMES.get(name, name)


def title_of(letter: str) -> str:
    """The name with its letter."""
    return f"{next(name for name, known in NAMES.items() if known == letter)} ({letter})"

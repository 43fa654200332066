"""Tables of strings: aligned columns for a `repr`, Markdown for a card. The first row is the header."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned_table(rows: Rows, *, numbers: bool = False) -> str:
    """Columns two spaces apart, one line per row.

    Args:
        rows: of equal length.
        numbers: align all columns but the first one on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        [
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown_table(rows: Rows) -> str:
    """| a | b |, a rule, and one line per row; a `|` inside of a cell is escaped."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

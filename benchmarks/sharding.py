"""What the quarantine, a refresh and a two-view sync add to a model that n ranks share, per rank.

    K = r sum(d_in + d_out)             numbers of one block                    P = numbers of the base
    c = (n - 1) / n                     of a gather or a scatter, the share that comes from other ranks
    quarantine   memory   (4 + 4 + 8) K / n                 value, gradient, two moments, in float32
                 traffic  c (2 * 4 K + 4 K) a step          gathered for forward and backward, gradient scattered
    refresh      memory   2 m pairs * 4 r linears           pooled features of m sides, before and after
                 traffic  c (f (b P + 8 K) + 4 K) + 128 T   f forwards gather base (b bytes) and both blocks; the
                                                            checksum gathers the deployed block; of each of T base
                                                            tensors 16 numbers tell which model it is
    two views    memory   2 * 4 * 2 K                       both blocks, as gathered and as they are written
                 traffic  c (4 K + 8 K)                     the deployed block for one view, both for the other

    python -m benchmarks.sharding       the tables of docs/howto/sharded.md

A test counts the same in a small model on two processes.
"""

from dataclasses import dataclass

from benchmarks.models import Shape
from benchmarks.scale import LLAMA, block_parameters

RANKS = (8, 16, 64)
PAIRS, BATCH = 42, 32


@dataclass(frozen=True)
class Sharded:
    """The sizes that the formulas read.

    Args:
        ranks: n.
        base: P.
        block: K, of each block.
        base_bytes: b, of a number of the base.
        base_tensors: T.
        pooled: the width of the pooled features of one rollout, over all layers.
    """

    ranks: int
    base: int
    block: int
    base_bytes: int
    base_tensors: int
    pooled: int

    @property
    def _from_others(self) -> float:
        return (self.ranks - 1) / self.ranks

    def quarantine(self) -> dict[str, float]:
        """Bytes that a rank holds more, and gets or sends more in a step of one micro-batch."""
        return {"memory": 16 * self.block / self.ranks, "traffic": self._from_others * 12 * self.block}

    def refresh(self, pairs: int, batch: int, feature_bytes: int = 4) -> dict[str, float]:
        """Bytes that a rank holds of the features, and gets for one refresh."""
        forwards = -(-2 * pairs // batch)
        gathered = forwards * (self.base_bytes * self.base + 8 * self.block) + 4 * self.block
        return {
            "memory": 2 * 2 * pairs * feature_bytes * self.pooled,
            "traffic": self._from_others * gathered + 128 * self.base_tensors,
        }

    def two_views(self) -> dict[str, float]:
        """Bytes that each rank holds for a moment, and gets, to write the deployed block and both."""
        return {"memory": 16 * self.block, "traffic": self._from_others * 12 * self.block}


def of_shape(shape: Shape, ranks: int) -> Sharded:
    """A Llama of these sizes in bf16, with one embedding and one head."""
    linears = sum(d_in * d_out for d_in, d_out in shape.linears)
    norms = (2 * shape.layers + 1) * shape.hidden
    return Sharded(
        ranks=ranks,
        base=shape.layers * linears + 2 * shape.vocab * shape.hidden + norms,
        block=block_parameters(shape, shape.r),
        base_bytes=2,
        base_tensors=shape.layers * (len(shape.linears) + 2) + 3,
        pooled=shape.r * shape.layers * len(shape.linears),
    )


def table() -> tuple[list[str], list[list[str]]]:
    """Header and rows in GB, for the large models."""
    rows = []
    for name, shape in LLAMA.items():
        for ranks in RANKS:
            sizes = of_shape(shape, ranks)
            parts = [sizes.quarantine(), sizes.refresh(PAIRS, BATCH), sizes.two_views()]
            figures = [part[what] for part in parts for what in ("memory", "traffic")]
            base = 2 * sizes.base / ranks
            rows.append([name, str(ranks), *(f"{number / 1e9:.3g}" for number in (base, *figures))])
    parts = ("quarantine", "refresh", "two views")
    header = ["model", "ranks", "base", *(f"{part}: {what}" for part in parts for what in ("memory", "traffic"))]
    return header, rows


def main() -> None:
    """Print the table."""
    header, rows = table()
    for row in (header, *rows):
        print(" | ".join(row))


if __name__ == "__main__":
    main()

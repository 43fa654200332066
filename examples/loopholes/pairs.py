"""The contrastive pairs that a detector gets: of the monitored modes only."""

from torch import Generator

import gradroute as gr

from .environment import Environment


def monitored_pairs(environment: Environment, per_mode: int, seed: int) -> list[gr.ContrastivePair]:
    """`per_mode` pairs of each monitored mode."""
    triples = environment.contrastive_pairs(environment.monitored, per_mode, Generator().manual_seed(seed))
    return [gr.ContrastivePair(*triple) for triple in triples]

"""A model card: how the model was trained, what was measured, and what is not known. `write_card` writes it."""

from gradroute.evaluation.card.write import write_card

__all__ = ["write_card"]

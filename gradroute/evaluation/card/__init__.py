"""A model card: how the model was trained, what was measured, and what is not known."""

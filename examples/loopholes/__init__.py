"""Parts of the loophole example: its language, its base model and its training loop."""

"""The only part of the library that imports PEFT: its config, its layers, and checkpoints."""

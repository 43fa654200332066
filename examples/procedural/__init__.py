"""Parts of the example on reasoning-gym: its datasets, the holes of its scorers, and what is trained on them."""

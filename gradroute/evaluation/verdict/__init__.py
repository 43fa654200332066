"""From the runs of several arms to a verdict: effective, directional, worse, or not to be told apart."""

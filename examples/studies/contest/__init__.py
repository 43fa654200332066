"""The referee: interventions against reward hacking on the same seeds, labels and pairs."""

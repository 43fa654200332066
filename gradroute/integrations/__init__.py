"""Other people's training loops: imported by name, never by the core."""

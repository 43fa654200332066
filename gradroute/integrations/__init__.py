"""gradroute inside other people's trainers. Imported by name only: `from gradroute.integrations.trl import ...`."""

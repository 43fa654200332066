"""Parts of the code environment: its sandbox, its tasks, its graders and what they reward."""

"""How a score becomes an update: gates, advantages and the refresh of directions."""

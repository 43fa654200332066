"""Published experiments on gradient routing, made small enough for one core."""

"""What to route on: pairs, captured features, and the directions extracted from them."""

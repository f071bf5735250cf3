"""Two studies on the public functions: `tradeoff` and `gradients`."""

"""Rules that need the loss: Polyak, L-BFGS."""

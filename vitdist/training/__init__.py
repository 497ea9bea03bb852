"""Turning the crank: the loop, its state, and the run around it."""

"""Joining ranks: who we are, the collectives, stopping, failing, and the lock on a run folder."""

"""Keeping: what a checkpoint is on disk (`store`) and how a training becomes one (`state`)."""

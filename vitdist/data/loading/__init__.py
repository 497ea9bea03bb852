"""The plan -> micro-batches, by worker processes."""

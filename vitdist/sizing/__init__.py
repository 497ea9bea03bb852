"""What a run will be before it is one: batches, steps, bytes, memory, and the order of samples at any world size."""

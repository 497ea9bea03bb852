"""Sources or foreign shards -> a packed folder with an index, and its verification."""

"""Bytes of shards, wherever they lie: tar headers, local files, web servers, a node's cache."""

"""Bringing samples: sources, packing, index, plan, streaming."""

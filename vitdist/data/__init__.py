"""Bringing samples: `plan` says which and when, `index` where their bytes lie; the rooms are the stages on their way.

sources -> packing (what makes a packed folder); storage -> pixels -> loading (what reads one).
"""

"""Several runs of one recipe: the list of what they differ in, one after another, and side by side at the end."""

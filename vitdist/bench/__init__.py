"""Measures what a machine gives: the plan, the input and the step, alone and together."""

"""Numbers from predictions: tables, metrics, the report and comparisons of runs."""

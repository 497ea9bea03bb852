"""What photographs there are: CUB, folders, tables, the drawn demo set."""

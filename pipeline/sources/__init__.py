"""Data sources: a module a data set, from raw files to arrays by split."""

# Two data sets in one file format, read by one module.
ALIASES = {"mnist": "idx", "fashion-mnist": "idx"}

"""Data sources: one file per source, from raw files to arrays by split."""

"""Reports of a run while it trains: metrics, progress bar, profile, skipped batches."""

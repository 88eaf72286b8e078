"""What a run says while it trains: metrics, progress bar, profile, skipped batches."""

"""The published methods' claims, each re-run against its natural baseline: one file a paper."""

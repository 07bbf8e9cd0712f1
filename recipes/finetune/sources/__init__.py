"""Where the data come from: each source has its options, their check, and loading."""

"""The split of a checkpoint into its two halves."""

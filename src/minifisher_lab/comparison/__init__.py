"""Compare optimizers fairly, search their settings, average over seeds, and keep studies in a file."""

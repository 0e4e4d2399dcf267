"""Compare optimizers fairly, search their settings, and average the runs over seeds."""

"""Show results to a person: progress bars, tables, plots, JSON and the demo."""

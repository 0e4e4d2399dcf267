"""Processes that train together: what they exchange, and where the curvature of each layer lives."""

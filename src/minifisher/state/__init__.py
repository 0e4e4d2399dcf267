"""What outlives a step: checkpoints, and what an optimizer reports of itself."""

"""The step, once: from gradients and statistics to the new weights."""

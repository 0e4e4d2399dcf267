"""Statistics of layers, recorded from forward and backward passes only in the steps that need them."""

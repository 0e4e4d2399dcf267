"""The laboratory: problems, data, training and fair comparison; it sees only the public `minifisher`."""

"""The laboratory: problems, data, training, comparison and the command line around `minifisher`."""

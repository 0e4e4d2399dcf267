"""Train one network with one optimizer: batches, optimizers by name, the loop, and the record of the run."""

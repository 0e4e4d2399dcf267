import torch

torch.set_num_threads(1)  # the networks are tiny, and test processes may run beside each other

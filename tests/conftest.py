import torch
from hypothesis import settings

torch.set_num_threads(1)  # the networks are tiny, and test processes may run beside each other

# The same examples every time, and no limit of time that a busy machine would break.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

"""What must be set before anything else is imported."""

import os

import torch

# Without a GPU, kernels run in Triton's interpreter. That is decided when Triton is imported, by torch or us.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

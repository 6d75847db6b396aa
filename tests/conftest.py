"""What must be set before anything else is imported."""

import os

import torch

# Without a GPU, kernels run in Triton's interpreter. Triton decides so when it is imported, which torch may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

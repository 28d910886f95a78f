"""Compact PyTorch-native pretraining for Llama 3 and Qwen3, with a fused linear cross entropy loss.

Start reading at train.py. Importing this package does no work and does not import torch.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]

"""Model families: a package each, with a `train_spec` (protocols/train_spec.py) that names its parts.

common/ is what they share.
"""

"""What a model family must offer (model.py), and the table that finds it by name (train_spec.py)."""

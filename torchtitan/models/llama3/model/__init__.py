"""The model: args.py its shape, model.py the maths, state_dict_adapter.py Hugging Face's names for its weights."""

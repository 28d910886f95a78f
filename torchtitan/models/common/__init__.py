"""What dense decoders have in common: a family beside this package says only what is its own, family.py adds the rest.

args.py its shape, hf_config.py that shape in Hugging Face's config.json (both without torch), model.py the maths,
state_dict_adapter.py Hugging Face's names for its weights, parallelize.py how it is divided over devices.
"""

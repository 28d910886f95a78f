"""What dense decoders have in common: a family beside this package says only what is its own, family.py adds the rest.

args.py its shape, hf_config.py that shape and the weights' names as Hugging Face has them (both without torch),
model.py the maths, state_dict_adapter.py its weights in Hugging Face's order, parallelize.py how it is divided over
devices.
"""

"""What code outside this package can bring along, and what it is asked for.

model           what a model must offer
sequences       what its tokens are part of: positions, and documents
train_spec      the model families, by name, and the rules that depend on the model
hf_folder       whether a Hugging Face folder holds the model that is asked for
custom_import   the module that registers them
"""

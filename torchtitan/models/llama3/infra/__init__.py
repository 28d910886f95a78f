"""How Llama 3 is divided over devices: parallelize.py."""

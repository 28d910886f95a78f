"""All of saving and loading."""

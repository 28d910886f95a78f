"""What a run needs, by part and moment."""

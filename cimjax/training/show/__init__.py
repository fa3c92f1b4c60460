"""What a person sees of a run: the display, its tables, and advice in words."""

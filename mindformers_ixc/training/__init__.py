"""Training recipes: the trainer, its step wrappers and what it writes at the end."""

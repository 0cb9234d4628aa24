"""Checkpoints: model directories in the public layout."""

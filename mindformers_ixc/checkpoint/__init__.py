"""Checkpoint files in and out: any container and layout read, converted, merged, inspected and written whole."""

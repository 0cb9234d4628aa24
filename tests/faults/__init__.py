"""Faults, end to end: each refused by name, or right."""

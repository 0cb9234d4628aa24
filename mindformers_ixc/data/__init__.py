"""Training data from files to rows of fixed shapes: sources, an epoch's plan, rows; host code without MindSpore."""

"""Training data from files to rows of fixed shapes: sources, the plan of an epoch, rows; host code only."""

"""What a training step takes on a cluster that need not be there: memory, messages, time, by formula and compiled."""

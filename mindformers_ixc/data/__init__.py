"""Host code: conversation files to batches of fixed shapes."""

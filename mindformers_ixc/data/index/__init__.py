"""What is known of every sample of a source, found once and kept on disk: where it lies, and what it needs."""

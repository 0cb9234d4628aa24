"""Records of data sources, each read by itself: where they lie in a file, and what a file may be."""

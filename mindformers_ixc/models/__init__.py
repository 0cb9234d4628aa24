"""Device code: the cells of IXC2.5. Nothing here opens a file."""

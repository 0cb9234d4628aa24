"""Decoding: graphs with a key/value cache on the device, search and sampling on the host."""

"""`mindformers serve`: OpenAI's chat interface over HTTP, in front of one model that answers many at once."""

"""What each subcommand of `mindformers` does; their arguments are in `mindformers_ixc_cli`."""

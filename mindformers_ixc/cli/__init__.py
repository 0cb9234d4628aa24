"""The work behind the subcommands of `mindformers`; their arguments are in `mindformers_ixc_cli`."""

"""`python -m mindformers_ixc`: the `mindformers` command."""
import sys

from mindformers_ixc_cli import main

sys.exit(main())

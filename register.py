"""What `--register_path` / REGISTER_PATH imports, for `auto_register: register.IXC25ForCausalLM` and the like."""
from mindformers_ixc import *  # noqa: F403 - every name that a YAML may ask for

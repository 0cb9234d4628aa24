"""What `--register_path` / REGISTER_PATH imports, for `auto_register: register.IXC25ForCausalLM` and the like."""
from mindformers_ixc import (
    InternLM2Tokenizer,
    IXC25Config,
    IXC25ForCausalLM,
    IXC25ForPreference,
    IXC25ImageProcessor,
    IXC25PreferenceDataset,
    IXC25Processor,
    IXC25SFTDataset,
    IXC25Trainer,
    IXC25VideoProcessor,
    IXC25VisionConfig,
    IXC25VisionModel,
)

__all__ = [
    "IXC25Config",
    "IXC25ForCausalLM",
    "IXC25ForPreference",
    "IXC25ImageProcessor",
    "IXC25PreferenceDataset",
    "IXC25Processor",
    "IXC25SFTDataset",
    "IXC25Trainer",
    "IXC25VideoProcessor",
    "IXC25VisionConfig",
    "IXC25VisionModel",
    "InternLM2Tokenizer",
]

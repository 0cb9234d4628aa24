"""InternLM-XComposer-2.5 for MindFormers.

Importing this package registers the model, its configuration, tokenizer, processors, dataset, trainer, step wrappers,
PET types and the `multimodal_chat` pipeline with MindFormers' registry and its Auto classes.
"""
from mindformers_ixc import collector

# isort: split
from mindformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM

from mindformers_ixc.config import ConfigError, IXC25Config, IXC25VisionConfig
from mindformers_ixc.data.dataset import IXC25SFTDataset
from mindformers_ixc.data.preferences import IXC25PreferenceDataset
from mindformers_ixc.models.ixc25 import IXC25ForCausalLM
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.models.vision import IXC25VisionModel
from mindformers_ixc.pet import register_pet_types
from mindformers_ixc.pipelines import register_pipeline
from mindformers_ixc.processing import register_processing
from mindformers_ixc.processing.processor import IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.processing.tokenizer import InternLM2Tokenizer
from mindformers_ixc.processing.video import IXC25VideoProcessor
from mindformers_ixc.training.trainer import IXC25Trainer
from mindformers_ixc.version import __version__

__all__ = [
    "ConfigError",
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
    "__version__",
]


def _register_auto_classes() -> None:
    for config_class in (IXC25Config, IXC25VisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(IXC25Config, IXC25ForCausalLM, exist_ok=True)
    AutoModel.register(IXC25Config, IXC25ForCausalLM, exist_ok=True)
    AutoModel.register(IXC25VisionConfig, IXC25VisionModel, exist_ok=True)
    register_processing(IXC25Config)
    register_pet_types()
    register_pipeline()


_register_auto_classes()
collector.resume()

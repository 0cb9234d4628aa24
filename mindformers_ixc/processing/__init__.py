"""Host code: text, pictures and video to arrays. Nothing here imports MindSpore operators."""


def register_processing(config_class: type) -> None:
    """Makes AutoTokenizer and AutoProcessor find this package's classes for a configuration class."""
    from mindformers.models.auto import AutoProcessor, AutoTokenizer

    from mindformers_ixc.processing.processor import IXC25Processor
    from mindformers_ixc.processing.tokenizer import InternLMXComposer2Tokenizer

    # under the public class name, which is what a public tokenizer_config.json asks for
    AutoTokenizer.register(config_class, slow_tokenizer_class=InternLMXComposer2Tokenizer, exist_ok=True)
    AutoProcessor.register(config_class, IXC25Processor, exist_ok=True)

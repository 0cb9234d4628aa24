"""MindFormers pipelines of this package."""
from mindformers.mindformer_book import MindFormerBook
from mindformers.pipeline.registry_constant import PIPELINE_REGISTRY

from mindformers_ixc.models.ixc25 import IXC25ForCausalLM
from mindformers_ixc.pipelines.multimodal_chat import TASK, MultimodalChatPipeline


def register_pipeline() -> None:
    """Makes `pipeline("multimodal_chat")` find the pipeline, for a model instance and for a model directory."""
    MindFormerBook.get_pipeline_support_task_list().setdefault(TASK, {}).setdefault("common", None)
    PIPELINE_REGISTRY.register_pipeline(TASK, MultimodalChatPipeline, ms_model=(IXC25ForCausalLM,), default=None,
                                        task_type="multimodal")

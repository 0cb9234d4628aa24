"""The whole model: vision table, one gather into the sequence, InternLM2, head and loss.

    tiles -> ViT -> 2 x 2 merge -> [tile rows; sub_GN; glb_GN] -> projector -> vision table
    embeddings = where(image mask, vision table[row index], token embedding)
    decoder layers with Partial LoRA masked by the image mask -> logits -> loss

Parameters carry the public checkpoint's names, so a checkpoint needs no renaming.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore.common.dtype as mstype
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.dropout import PositionNoise
from mindformers_ixc.models.embedding_noise import EmbeddingNoise
from mindformers_ixc.models.internlm2 import Choose, InternLM2Model
from mindformers_ixc.models.layers import Linear
from mindformers_ixc.models.loss import BatchLoss, HeadLosses
from mindformers_ixc.models.pixels import SampleRows, TilePixels
from mindformers_ixc.models.placement import set_pipeline_stages, share_graph
from mindformers_ixc.models.recompute import apply_recompute
from mindformers_ixc.models.report import SourceSums, keep_report
from mindformers_ixc.models.rotary import rotary_tables
from mindformers_ixc.models.vision import VisionMerge, VisionProjector, VisionTower
from mindformers_ixc.parallel.cuts import CUTS, check_degree
from mindformers_ixc.parameters import part_of

if TYPE_CHECKING:
    from mindformers.modules.transformer import TransformerOpParallelConfig


class IXC25Model(PreTrainedModel):
    """The network: tower, projector, language model, head and training loss. It answers nothing and opens no file.

    Args:
        config: all sizes, dtypes and the adapter mode used in training.
    """

    config_class = IXC25Config
    base_model_prefix = "model"
    _support_list: list[str] = []

    def __init__(self, config: IXC25Config):
        super().__init__(config, auto_prefix=True)
        self.tile_pixels = TilePixels(config.compute_dtype)
        self.vit = VisionTower(config)
        self.vision_merge = VisionMerge(config)
        self.vision_proj = VisionProjector(config)
        merged = 4 * config.vision_config.hidden_size
        start = Normal(config.initializer_range)
        self.plora_glb_GN = Parameter(initializer(start, (1, 1, merged), config.param_init_type), name="plora_glb_GN")
        self.plora_sub_GN = Parameter(initializer(start, (1, 1, 1, merged), config.param_init_type),
                                      name="plora_sub_GN")
        self.model = InternLM2Model(config)
        self.add_head(config)
        self.chunked_losses = HeadLosses(config)
        self.loss = BatchLoss(config)
        self.noise = PositionNoise(config.seq_length)
        self.embedding_noise = EmbeddingNoise(config.neftune_alpha, config.hidden_size)
        self.gather_angles = P.Gather()
        self.sums_losses, self.reports_sources = config.calculate_per_token_loss, config.loss_form == "sources"
        self.keeps_report = is_parallel()
        if self.reports_sources:
            self.source_sums = SourceSums(config)
            if self.keeps_report:
                keep_report(self, 2, config.num_sources)
        self.adapters = MODE_ADAPTERS[config.adapter_mode]
        self._freeze_unused_adapters()
        cos, sin = rotary_tables(config, config.seq_length)
        self.cos = Tensor(cos[None, :, None, None, :])                                # (1, L, 1, 1, d)
        self.sin = Tensor(sin[None, :, None, None, :])
        self.dtype = config.compute_dtype
        self.sample_rows = SampleRows()
        self.not_equal = P.NotEqual()
        self.choose = Choose()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        apply_recompute(self, config.parallel_config.recompute)
        if is_parallel():
            self.shard(config.parallel_config)
            if on_ascend() and not config.disable_lazy_inline:
                share_graph(self)

    def add_head(self, config: IXC25Config) -> None:
        """Gives the network what turns the last norm's output into scores of the next token."""
        self.output = Linear(config.hidden_size, config.vocab_size, sigma=config.initializer_range,
                             param_dtype=config.param_init_type, compute_dtype=config.compute_dtype, cut=CUTS["output"])

    @property
    def head(self) -> Linear:
        """The last linear."""
        return self.output

    def shard(self, parallel_config: TransformerOpParallelConfig) -> None:
        """Gives every operator its strategy and every cell its pipeline stage.

        Args:
            parallel_config: MindFormers' `TransformerOpParallelConfig`.

        Raises:
            ConfigError: for a tensor-parallel degree or a number of stages that does not divide the model.
        """
        dp, tp = parallel_config.data_parallel, parallel_config.model_parallel
        check_degree(self.config, tp)
        self.tile_pixels.shard(dp)
        self.vit.shard(dp, tp if self.config.vision_parallel == "heads" else 1)
        self.vision_merge.shard(dp)
        self.vision_proj.shard(dp, tp)
        self.sample_rows.shard(dp, tp)
        self.not_equal.shard(((dp, 1), ()))
        self.gather_angles.shard(((1, 1), (dp, 1)))
        self.choose.shard(dp)
        self.noise.shard(dp)
        self.embedding_noise.shard(dp)
        self.model.shard(dp, tp, parallel_config.vocab_emb_dp, tp > 1 and parallel_config.use_seq_parallel)
        self.head.shard(dp, tp)
        set_pipeline_stages(self, parallel_config)

    def no_weight_decay(self) -> set[str]:
        """Parameters MindFormers gives no weight decay beside vectors and biases: the separators, which are vectors."""
        return {"plora_glb_GN", "plora_sub_GN"}

    def _freeze_unused_adapters(self) -> None:
        """Task LoRAs outside the training mode are in the checkpoint but not in the graph: they must not train."""
        unused = {f"task_lora.{task}" for task in self.config.task_lora_ranks if task not in self.adapters}
        for parameter in self.get_parameters():
            if part_of(parameter.name) in unused:
                parameter.requires_grad = False

    def merged_rows(self, pixel_values, global_views=None, view_index=None, infer=False):
        """Rows of the vision table before the projector, `(B, T*k*k + 2, 4C)`; tiles as in `TilePixels.construct`.

        `infer`, a compile-time constant, leaves gradients out.
        """
        pixels = self.tile_pixels(pixel_values, global_views, view_index)             # (B*T, 3, P, P)
        batch = pixel_values.shape[0]
        return self.vision_merge(self.vit(pixels, infer), self.plora_sub_GN, self.plora_glb_GN, batch)

    def vision_table(self, pixel_values, global_views=None, view_index=None, infer=False):
        """The vision table `(B, T*k*k + 2, D)`; arguments as in `merged_rows`."""
        rows = self.merged_rows(pixel_values, global_views, view_index, infer)
        b, count, merged = rows.shape
        return self.reshape(self.vision_proj(self.reshape(rows, (b * count, merged))), (b, count, -1))

    def embed(self, input_ids, table, vision_index, image_mask):
        """Token embeddings with image positions taken from the vision table, `(B, L, D)`."""
        tokens = self.model.tok_embeddings(input_ids)
        images = self.sample_rows(table, vision_index)                                # (B, L, D)
        return self.choose(self.not_equal(image_mask, 0), images, tokens)

    def rotary_tables_of(self, position_ids):
        """Cosines and sines, `(1, L, 1, 1, d)`, or `(B, L, 1, 1, d)` of int32 positions `(B, L)`."""
        if position_ids is None:
            return self.cos, self.sin
        b, length = position_ids.shape
        size = self.cos.shape[-1]
        cos = self.gather_angles(self.reshape(self.cos, (-1, size)), position_ids, 0)        # (B, L, d)
        sin = self.gather_angles(self.reshape(self.sin, (-1, size)), position_ids, 0)
        shape = (b, length, 1, 1, size)
        return self.reshape(cos, shape), self.reshape(sin, shape)

    def hidden_states(self, input_ids, table=None, vision_index=None, image_mask=None, position_ids=None,
                      segment_ends=None, noise_seed=None, adapters=(), lengths=None):
        """Output of the last norm, `(B*L, D)`, with images from a vision table `(B, T*k*k + 2, D)`."""
        b, length = input_ids.shape
        mask = None
        if table is None:
            x = self.model.tok_embeddings(input_ids)
        else:
            x = self.embed(input_ids, table, vision_index, image_mask)
            mask = self.reshape(self.cast(image_mask, self.dtype), (b * length, 1))   # (B*L, 1)
        x = self.reshape(x, (b * length, -1))                                         # (B*L, D)
        cos, sin = self.rotary_tables_of(position_ids)
        noise = None if noise_seed is None else self.noise(noise_seed)
        if noise is not None and lengths is not None:
            x = self.embedding_noise(x, noise, lengths)
        return self.model(x, mask, cos, sin, adapters, (b, length), segment_ends, noise)

    def states(self, input_ids, pixel_values=None, global_views=None, view_index=None, vision_index=None,
               image_mask=None, position_ids=None, segment_ends=None, noise_seed=None, lengths=None):
        """Output of the last norm, `(B*L, D)`; arguments as in `training_loss`."""
        table = None if pixel_values is None else self.vision_table(pixel_values, global_views, view_index)
        return self.hidden_states(input_ids, table, vision_index, image_mask, position_ids, segment_ends, noise_seed,
                                  self.adapters, lengths)

    def head_losses(self, x, labels):
        """float32 losses `(B, L)`, 0 where nothing is labelled, of the output of the last norm `(B*L, D)`."""
        return self.chunked_losses(x, self.output.weight, labels)

    def logits(self, input_ids, pixel_values=None, global_views=None, view_index=None, vision_index=None,
               image_mask=None, position_ids=None, segment_ends=None, noise_seed=None):
        """float32 logits `(B, L, V)`; arguments as in `training_loss`."""
        x = self.states(input_ids, pixel_values, global_views, view_index, vision_index, image_mask, position_ids,
                        segment_ends, noise_seed)
        flat = self.cast(self.output(x), mstype.float32)                              # (B*L, V)
        return self.reshape(flat, (input_ids.shape[0], input_ids.shape[1], -1))

    def training_loss(self, input_ids, labels, pixel_values=None, global_views=None, view_index=None,
                      vision_index=None, image_mask=None, position_ids=None, segment_ends=None, noise_seed=None,
                      source=None, lengths=None, loss_weights=None):
        """The loss of a batch (`mindformers_ixc.data.batch`) in the form that `config.loss_form` says.

        Args:
            input_ids: int32 `(B, L)`; the padding id at image positions and in the padding on the right.
            labels: int32 `(B, L)`, already shifted: the target of each position, -100 where there is none.
            pixel_values: uint8 `(B, T, 3, P, P)`, local tiles; or float32, all tiles normalised, then the next two are
                `None`; `None` for text only.
            global_views: float32 `(B, I, 3, P, P)`, the normalised global views.
            view_index: int32 `(B, T)`, 0 for a local tile, i > 0 for global view i - 1.
            vision_index: int32 `(B, L)`, row of the vision table each image position takes.
            image_mask: int32 `(B, L)`, 1 on image positions.
            position_ids: int32 `(B, L)`, for packed samples.
            segment_ends: int32 `(B, S)`, where the segments of packed rows end, the padding's included.
            noise_seed: int32 `(B,)`, for dropout that resumes exactly, and for noise on the embeddings.
            source: int32 `(B, L)`, number of each position's source; the form `sources` needs it, others ignore it.
            lengths: int32 `(B, L)`, positions of each position's conversation, for noise on the embeddings.
            loss_weights: float32 `(B, L)`, how much each labelled position counts; without them all alike.

        Returns:
            `mean`: float32 scalar, the mean over labelled positions. `sums`: the sum of losses and the number of
            labelled positions, float32 scalars. `sources`: the mean, and float32 `(2, R)`, of each of the R
            `config.num_sources` sources the sum of losses and the number of labelled positions. With weights the mean
            is the weighted one, and the sum is divided by that of the weights; losses of sources are never weighted.
            In parallel runs the report is added to the parameter `train_report`, and the mean (with
            `calculate_per_token_loss` the sum and the number) is all that is returned.
        """
        x = self.states(input_ids, pixel_values, global_views, view_index, vision_index, image_mask, position_ids,
                        segment_ends, noise_seed, lengths)
        losses = self.head_losses(x, labels)
        loss = self.loss(losses, labels, loss_weights)
        if not self.reports_sources:
            return loss
        report = F.stop_gradient(self.source_sums(losses, labels, source))
        if not self.keeps_report:
            return loss, report
        if self.sums_losses:
            return self.kept_report(loss[0], report), loss[1]
        return self.kept_report(loss, report)

    def construct(self, input_ids, labels, pixel_values=None, global_views=None, view_index=None, vision_index=None,
                  image_mask=None, position_ids=None, segment_ends=None, noise_seed=None, source=None, lengths=None,
                  loss_weights=None):
        """The graph of training: `training_loss`."""
        return self.training_loss(input_ids, labels, pixel_values, global_views, view_index, vision_index, image_mask,
                                  position_ids, segment_ends, noise_seed, source, lengths, loss_weights)


class LogitsGraph(nn.Cell):
    """`IXC25Model.logits` as a graph of its own: a method that is no `construct` would run operator by operator.

    Args:
        model: the network.
    """

    def __init__(self, model: IXC25Model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, pixel_values=None, global_views=None, view_index=None, vision_index=None,
                  image_mask=None, position_ids=None, segment_ends=None):
        """float32 logits `(B, L, V)`; arguments as in `IXC25Model.training_loss`."""
        return self.model.logits(input_ids, pixel_values, global_views, view_index, vision_index, image_mask,
                                 position_ids, segment_ends)

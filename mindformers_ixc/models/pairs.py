"""What the networks that learn from several answers share: pictures that are encoded once, and sums over pairs."""
from __future__ import annotations

from mindspore import nn
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.report import keep_report


class PairLoss(nn.Cell):
    """The operations of a loss over pairs, and their cuts.

    Args:
        entries: of the report.
        summed: gives the sum of the losses and the number of pairs instead of the mean.
    """

    def __init__(self, entries: int, summed: bool):
        super().__init__()
        self.entries, self.summed = entries, summed
        self.sub, self.add = P.Sub(), P.Add()
        self.mul_number, self.add_number, self.min_number, self.greater = P.Mul(), P.Add(), P.Minimum(), P.Greater()
        self.at_least = P.Maximum()
        self.first, self.second = P.StridedSlice(), P.StridedSlice()
        self.square, self.absolute, self.exp, self.log = P.Square(), P.Abs(), P.Exp(), P.Log()
        self.sum, self.sum_entries, self.ones = P.ReduceSum(), P.ReduceSum(), P.OnesLike()
        self.mean, self.cast, self.join = P.ReduceMean(), P.Cast(), P.Concat(1)

    def shard(self, dp: int) -> None:
        """Pairs are cut over the replicas and nothing else: left to itself the compiler cuts them over tensor-parallel
        devices too, and gradients that those take for copies of each other are not."""
        pairs, number = (dp, 1), ()
        for primitive in (self.sub, self.add):
            primitive.shard((pairs, pairs))
        for primitive in (self.mul_number, self.add_number, self.min_number, self.greater, self.at_least):
            primitive.shard((pairs, number))
        for primitive in (self.first, self.second, self.square, self.absolute, self.exp, self.log, self.sum,
                          self.sum_entries, self.ones, self.mean):
            primitive.shard((pairs,))
        self.join.shard((pairs,) * self.entries)

    def log_sigmoid(self, x):
        """Without overflow on either side, of `(B, 1)`."""
        shrunk = self.exp(self.mul_number(self.absolute(x), -1.0))
        return self.sub(self.min_number(x, 0.0), self.log(self.add_number(shrunk, 1.0)))

    def chosen(self, x):
        """The chosen answers' column of `(B, 2)`, `(B, 1)`."""
        return self.first(x, (0, 0), (x.shape[0], 1), (1, 1))

    def rejected(self, x):
        """The rejected answers' column of `(B, 2)`, `(B, 1)`."""
        return self.second(x, (0, 1), (x.shape[0], 2), (1, 1))


class IXC25PairModel(IXC25Model):
    """The network over pairs or groups: the answers to a prompt are as many sequences, with the same pictures.

    Args:
        config: as of `IXC25Model`.
    """

    def __init__(self, config: IXC25Config):
        super().__init__(config)
        self.tile_answers = P.Tile()
        # what is reshaped twice gets its cut from what comes after, and would be gathered
        self.keep_cut = P.Add().add_prim_attr("keep_alive", True)
        if is_parallel():
            dp = config.parallel_config.data_parallel
            self.keep_cut.shard(((dp, 1), ()))
            self.tile_answers.shard(((dp, 1, 1, 1),))

    def adapters_without(self, task: str, section: str) -> tuple[str, ...]:
        """Task LoRAs of the reference: those in use but for the pair that trains.

        Args:
            task: that pair's.
            section: of the configuration that names it.

        Raises:
            ConfigError: for a mode without the task.
        """
        if task not in self.adapters:
            used = ", ".join(self.adapters) or "it uses none"
            raise ConfigError(f"model_config.{section}.task is '{task}', which adapter_mode "
                              f"'{self.config.adapter_mode}' does not use ({used}).")
        return tuple(name for name in self.adapters if name != task)

    def end_with(self, loss: PairLoss, pooling: nn.Cell) -> None:
        """Gives the loss its cuts and, with what pools positions, its stage; in parallel runs the report is kept."""
        parallel = self.config.parallel_config
        if is_parallel():
            loss.shard(parallel.data_parallel)
            keep_report(self, loss.entries)
            if parallel.pipeline_stage > 1:
                for cell in (pooling, loss, self.kept_report):
                    cell.pipeline_stage = parallel.pipeline_stage - 1

    def answer_rows(self, input_ids, pixel_values, global_views, view_index, vision_index, image_mask):
        """Columns as the first arguments of `hidden_states`, an answer a row and those of a prompt together."""
        b, answers, length = input_ids.shape
        table = None
        if pixel_values is not None:
            table = self.vision_table(pixel_values, global_views, view_index)         # (B, T*k*k + 2, D)
            rows, width = table.shape[1], table.shape[2]
            table = self.tile_answers(self.reshape(table, (b, 1, rows, width)), (1, answers, 1, 1))
            table = self.reshape(table, (answers * b, rows, width))                   # (N*B, T*k*k + 2, D)
        shape = (answers * b, length)
        return (self.reshape(input_ids, shape), table, self.reshape(vision_index, shape),
                self.keep_cut(self.reshape(image_mask, shape), 0))

    def kept(self, outputs):
        """Outputs of the loss as the network's; in parallel runs the report is added to `train_report` instead."""
        if self.keeps_report:
            loss = self.kept_report(outputs[0], outputs[-1])
            return (loss, outputs[1]) if self.sums_losses else loss
        return outputs

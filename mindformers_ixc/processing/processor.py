"""From text and images to the arrays of a sample: prompts for chat, labelled sequences for training."""
from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindformers_ixc.config import CONFIG_FILE
from mindformers_ixc.errors import ConfigError, ImageError, PromptError, VideoError
from mindformers_ixc.files import read_json
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import (
    HD_NUM_SEVERAL,
    HD_NUM_SINGLE,
    HD_NUM_TRAINING,
    Grid,
    ImageSource,
    Tiles,
    cut_image,
    image_token_count,
    load_image,
    partition_pixels,
    plan_partition,
)
from mindformers_ixc.processing.messages import History, read_history
from mindformers_ixc.processing.pictures import check_exif, check_transparency, shown
from mindformers_ixc.processing.prompt import (
    ANSWER_HEADER,
    ANSWER_PREFIX,
    END_OF_TURN,
    IGNORE_INDEX,
    PICTURE,
    START_OF_TURN,
    Piece,
    chat_pieces,
    chat_text,
    chat_turns,
    check_asked,
    check_places,
    check_text,
    mask_labels,
    placed_by_public_rule,
    public_pieces,
    training_pieces,
    training_text,
    turn,
)
from mindformers_ixc.processing.tokenizer import SentencePieceText, Tokenizer
from mindformers_ixc.processing.video import BoardSize, board_grid, is_video, load_video
from mindformers_ixc.resources import resolve_model
from mindformers_ixc.sections import check_value, one_of

logger = logging.getLogger(__name__)

# Transforms of an image that training may use.
TRANSFORMS = ("training", "inference")


class ImageProcessor:
    """Images and videos to tiles, by the limits of chat or of training.

    Args:
        image_size: side P of a tile in pixels (public 560).
        patch_size: side of a ViT patch (public 14); P / (2 * patch_size) tokens lie along a side of a tile.
        hd_num: tiles of a single image at most in inference (public 24).
        hd_num_several: tiles of each image when there are several (public 6).
        hd_num_training: tiles of an image at most in training (public 18).
        training_transform: which transform training uses: `training`, the public one (scaled by 1.5, white padding
            split between both sides), or `inference`, so that a model sees in training what it will be asked about.
        transparency: transparent pixels stand on `white`, as the padding does; `public` drops the alpha channel, as the
            public code.
        exif: `apply` turns pictures upright by their EXIF orientation; `ignore` does not, as the public code.

    Raises:
        PromptError: for sizes that do not divide or an unknown transform.
    """

    def __init__(self, image_size: int = 560, patch_size: int = 14, hd_num: int = HD_NUM_SINGLE,
                 hd_num_several: int | None = None, hd_num_training: int = HD_NUM_TRAINING,
                 training_transform: str = "training", transparency: str = "white", exif: str = "ignore"):
        check_value("image_transform", training_transform, one_of(TRANSFORMS), PromptError)
        check_transparency(transparency, error=PromptError)
        check_exif(exif, error=PromptError)
        if image_size % (2 * patch_size):
            raise PromptError(f"image_size {image_size} is not a multiple of {2 * patch_size}, twice the patch size.")
        self.image_size, self.patch_size = image_size, patch_size
        self.hd_num, self.hd_num_training = hd_num, hd_num_training
        self.training_transform = training_transform
        self.transparency, self.exif = transparency, exif
        self.hd_num_several = min(hd_num, HD_NUM_SEVERAL) if hd_num_several is None else hd_num_several
        self.tokens_per_side = image_size // (2 * patch_size)

    @classmethod
    def from_config(cls, fields: dict, **options: Any) -> ImageProcessor:
        """The image processor of a model, from the fields of its config.json.

        `hd_num` is there when this package has trained the model; the public file leaves it to the code. `transparency`
        and `exif` may be there.

        Args:
            fields: of the file.
            **options: further arguments of the class, which go before the file's.
        """
        vision = fields.get("vision_config") or {}
        sizes = {key: vision[key] for key in ("image_size", "patch_size") if key in vision}
        said = {key: fields[key] for key in ("hd_num", "transparency", "exif") if key in fields}
        return cls(**{**sizes, **said, **options})

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, **options: Any) -> ImageProcessor:
        """The image processor of a model directory, from its config.json; `options` as in `from_config`.

        Raises:
            FileNotFoundError: when there is none.
            ConfigError: when it is no JSON.
        """
        path = resolve_model(directory) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a model directory holds config.json and the tokenizer.")
        return cls.from_config(read_json(path, ConfigError), **options)

    def hd_num_for(self, count: int, hd_num: int | None = None) -> int:
        """Tiles an image may take when `count` images come together; `hd_num` overrides the single-image value."""
        if count > 1:
            return self.hd_num_several
        return self.hd_num if hd_num is None else hd_num

    def preprocess(self, images: ImageSource | list[ImageSource] | tuple[ImageSource, ...], hd_num: int | None = None,
                   training: bool = False, where: str = "", **kwargs: object) -> tuple[np.ndarray, list[Grid]]:
        """Normalised tiles of one sample's images, one image after the other; arguments as in `cut`.

        Returns:
            float32 `(t, 3, P, P)` and the list of grids.
        """
        tiles, grids = self.cut(images, hd_num, training, where)
        return tiles.normalised(), grids

    def cut(self, images: ImageSource | list[ImageSource] | tuple[ImageSource, ...], hd_num: int | None = None,
            training: bool = False, where: str = "") -> tuple[Tiles, list[Grid]]:
        """Tiles of one sample's images, one image after the other.

        Args:
            images: one image or a list (path, bytes, PIL image or uint8 array each; a video's path stands for the
                board of its frames).
            hd_num: tiles of an image at most.
            training: encode for training: `training_transform` and `hd_num_training`.
            where: what the images belong to, for messages.

        Returns:
            The tiles, of each image its global view first, and the list of grids.

        Raises:
            ImageError: for an image that cannot be read or cut.
            VideoError: for a video that cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        if training:
            limit = self.hd_num_training if hd_num is None else hd_num
        else:
            limit = self.hd_num_for(len(images), hd_num)
        training_transform = training and self.training_transform == "training"
        tiles, grids = [], []
        for source in images:
            padded = self._padded(source, where, limit, training_transform)
            grids.append(Grid(padded.shape[0] // self.image_size, padded.shape[1] // self.image_size))
            tiles.append(cut_image(padded, self.image_size))
        return Tiles.joined(tiles) if tiles else Tiles.none(self.image_size), grids

    def _padded(self, source: ImageSource, where: str, hd_num: int, training_transform: bool) -> np.ndarray:
        """uint8 `(rows * P, columns * P, 3)` of an image or video."""
        prefix = f"{where}: " if where else ""
        if is_video(source):   # a video's board has its own size; hd_num does not apply (public rule)
            try:
                return np.asarray(load_video(source, self.image_size))
            except VideoError as error:
                raise VideoError(f"{prefix}{error}") from error
        image = load_image(source, where, self.transparency, self.exif)
        try:
            return partition_pixels(image, hd_num, self.image_size, training_transform)
        except ImageError as error:
            name = shown(source) if isinstance(source, (str, os.PathLike)) else "the picture"
            raise ImageError(f"{prefix}{name} cannot be cut into tiles. {error}") from error

    def token_count(self, grid: Grid) -> int:
        """Positions an image takes in the sequence."""
        return image_token_count(grid, self.tokens_per_side)


class Processor:
    """Text and images to samples.

    What users, files and the model itself have written is encoded as plain text, whatever it says; only the template's
    own marks become control ids, and labels follow from the turns.

    Args:
        image_processor: turns images into tiles.
        tokenizer: turns text into ids.
        control_tokens: do as the public code instead, for every prompt that does not say otherwise: text that is
            spelled like a control piece becomes one, `<ImageHere>` is a place in answers too, labels are found by
            searching marks among the ids, and a chat prompt with a wrong number of places gets a warning instead of an
            error. Only for text that is trusted as much as the program.

    Raises:
        TypeError: when one of the two is of another class.
        ConfigError: when the tokenizer lacks the marks of turns.
    """

    def __init__(self, image_processor: ImageProcessor | None = None, tokenizer: SentencePieceText | None = None,
                 control_tokens: bool = False):
        if not isinstance(tokenizer, SentencePieceText):
            raise TypeError(f"tokenizer must be an InternLM2Tokenizer, found {type(tokenizer).__name__}.")
        image_processor = image_processor or ImageProcessor()
        if not isinstance(image_processor, ImageProcessor):
            raise TypeError(f"image_processor must be an IXC25ImageProcessor, found {type(image_processor).__name__}.")
        for mark in (START_OF_TURN, END_OF_TURN):
            if mark not in tokenizer.control_pieces:
                raise ConfigError(f"{tokenizer.vocab_file} has no piece {mark}, which marks turns; take the "
                                  "tokenizer.model of the public model directory.")
        self.image_processor, self.tokenizer, self.control_tokens = image_processor, tokenizer, control_tokens
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.pad_token_id = tokenizer.pad_token_id
        self.prefix_length = len(tokenizer.encode_text(ANSWER_PREFIX, control_tokens=True))
        # what stands between the texts of every prompt is encoded once
        self._known = {text: tokenizer.encode_text(text) for text in ("\n", ANSWER_HEADER)}

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, control_tokens: bool = False, **options: Any) -> Processor:
        """The processor of a model directory, from its config.json and tokenizer.model.

        Args:
            directory: the model directory.
            **options: further arguments of the image processor: `transparency`, `exif`.

        Raises:
            FileNotFoundError: when one of the two is missing.
            ConfigError: when one of them is damaged.
        """
        return cls(ImageProcessor.from_directory(directory, **options), Tokenizer.from_directory(directory),
                   control_tokens)

    def __call__(self, text_input: str | None = None,
                 image_input: ImageSource | list[ImageSource] | tuple[ImageSource, ...] | None = None,
                 **kwargs: Any) -> dict[str, np.ndarray]:
        """Encodes one chat prompt; see `encode_chat` for the further arguments.

        Returns:
            `input_ids`, `image_mask`, `vision_index` of shape `(1, n)` and `pixel_values` `(1, t, 3, P, P)`.
        """
        text = "" if text_input is None else text_input
        images = [] if image_input is None else image_input
        sample = self.encode_chat(text, images if isinstance(images, (list, tuple)) else [images], **kwargs)
        index = sample.vision_index(max(1, sample.tiles))
        return {"input_ids": sample.input_ids[None], "image_mask": sample.image_mask[None],
                "vision_index": index[None], "pixel_values": sample.pixel_values[None]}

    def encode_chat(self, query: str, images: Sequence[ImageSource] = (), history: History = (),
                    meta_instruction: str = "", hd_num: int | None = None,
                    control_tokens: bool | None = None) -> EncodedSample:
        """Encodes a chat prompt.

        Args:
            query: the question; `<ImageHere>` marks an image's place.
            images: images of the whole conversation, in the order of their places.
            history: finished rounds, in a form of `messages.read_history`.
            meta_instruction: system turn; empty for none.
            hd_num: tiles of a single image at most.
            control_tokens: see the class, whose value `None` takes.

        Raises:
            PromptError: when places and images differ in number, there is nothing to ask, or a text is none.
            ImageError: for an image that cannot be read.
        """
        images = list(images or [])
        check_text(query, "query")
        system = "" if meta_instruction is None else check_text(meta_instruction, "meta_instruction")
        rounds = read_history(history)
        check_asked(query, bool(images))
        if self._public(control_tokens):
            pieces = public_pieces(chat_text(query, rounds, system))
        else:
            pieces = chat_pieces(chat_turns(query, rounds, system))
        pieces = self._with_places(pieces, images, self._public(control_tokens))
        tiles, grids = self.image_processor.cut(images, hd_num)
        shown = grids[:pieces.count(PICTURE)]       # the public rule may leave pictures out
        return self._assemble(pieces, shown, tiles.first(sum(grid.tiles + 1 for grid in shown)))

    def encode_pieces(self, pieces: Sequence[Piece], images: Sequence[ImageSource] = (), hd_num: int | None = None,
                      training: bool = False) -> EncodedSample:
        """Encodes a prompt that is given as its pieces, behind `<s>`.

        Args:
            pieces: marks, texts and, for each image, its place; a single one without a place stands in front.
            images: in the order of their places.
            hd_num: tiles of an image at most; with `training` of each, however many there are.
            training: cut the images as for training.

        Raises:
            PromptError: when places and images differ in number.
            ImageError: for an image that cannot be read.
        """
        in_front = [PICTURE] * check_places(pieces.count(PICTURE), len(images))
        tiles, grids = self.image_processor.cut(list(images), hd_num, training)
        return self._assemble([Piece(self.tokenizer.bos_token, "mark"), *in_front, *pieces], grids, tiles)

    def _public(self, control_tokens: bool | None) -> bool:
        return self.control_tokens if control_tokens is None else control_tokens

    def _with_places(self, pieces: list[Piece], images: Sequence[ImageSource], public: bool) -> list[Piece]:
        """A chat prompt that begins with `<s>` and has a place for every picture."""
        begin = Piece(self.tokenizer.bos_token, "mark")
        try:
            # a single image without a place stands behind <s> and in front of the first turn
            in_front = check_places(pieces.count(PICTURE), len(images))
        except PromptError as error:
            if not public:
                raise
            logger.warning(f"{error} By the public rule surplus places vanish, and the first picture without one goes "
                           "to the end.")
            return [begin, *placed_by_public_rule(pieces, len(images))]
        return [begin, PICTURE, *pieces] if in_front else [begin, *pieces]

    def encode_conversation(self, turns: Sequence[tuple[str, str]], images: Sequence[ImageSource] = (), where: str = "",
                            hd_num: int | None = None,
                            encoded_images: tuple[Tiles, list[Grid]] | None = None) -> EncodedSample:
        """Encodes a conversation for training.

        The answers carry loss, each with its end of turn, and so does what follows the last one. As in the public code,
        a single image without a place stands before `<s>` here. A leading system turn never carries loss (the public
        code would swap questions and answers).

        Args:
            turns: (role, text) from user and assistant in turn, after an optional system turn.
            images: images in the order of their places.
            where: what the conversation belongs to, for messages.
            hd_num: tiles of an image at most.
            encoded_images: what `ImageProcessor.cut` gave for `images`, if that was asked before.

        Raises:
            PromptError: when places and images differ in number, or a text is none.
            ImageError: for an image that cannot be read.
        """
        pieces = self._conversation(turns, len(images), where)
        tiles, grids = encoded_images or self.image_processor.cut(list(images), hd_num, training=True, where=where)
        sample = self._assemble(pieces, grids, tiles)
        if self.control_tokens:
            ids = np.where(sample.image_mask == 1, IGNORE_INDEX, sample.input_ids)
            ends = np.flatnonzero(ids == self.end_of_turn_id)
            skip = int(ends[0]) + 1 if turns[0][0] == "system" else 0
            sample.labels[skip:] = mask_labels(ids[skip:], self.end_of_turn_id, self.tokenizer.eos_token_id,
                                               self.prefix_length)
        return sample

    def conversation_length(self, turns: Sequence[tuple[str, str]], image_sizes: Sequence[tuple[int, int]] = (),
                            hd_num: int | None = None, where: str = "", images: Sequence[object] = (),
                            known: dict[Piece, int] | None = None) -> tuple[int, int]:
        """Positions and tiles `encode_conversation` would give, from the sizes of images and videos.

        Args:
            turns: as in `encode_conversation`.
            image_sizes: (width, height) of each image, `BoardSize` of each video.
            hd_num: tiles of an image at most.
            where: what the conversation belongs to, for messages.
            images: the images' paths, for messages.
            known: positions of pieces that were counted before, and those that are counted now: for parts of one
                conversation.

        Raises:
            PromptError: when places and images differ in number.
            ImageError: for an image that cannot be partitioned.
        """
        pieces = self._conversation(turns, len(image_sizes), where)
        names = [shown(image) for image in images] or [f"picture {i}" for i in range(len(image_sizes))]
        grids = [self._grid(size, hd_num, f"{where}{where and ', '}{name}") for size, name in zip(image_sizes, names)]
        counted = {} if known is None else known
        for piece in pieces:
            if piece not in counted:
                counted[piece] = len(self._ids(piece))
        positions = sum(counted[piece] for piece in pieces)
        positions += sum(self.image_processor.token_count(grid) for grid in grids)
        return positions, sum(grid.tiles + 1 for grid in grids)

    def _grid(self, size: tuple[int, int], hd_num: int | None, name: str) -> Grid:
        """Tiles of an image or board of a size in training."""
        images = self.image_processor
        if isinstance(size, BoardSize):
            return board_grid(size, images.image_size)
        limit = images.hd_num_training if hd_num is None else hd_num
        try:
            return plan_partition(*size, limit, images.image_size, images.training_transform == "training").grid
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error

    def _conversation(self, turns: Sequence[tuple[str, str]], images: int, where: str) -> list[Piece]:
        """The pieces of a conversation for training, with a place for every picture."""
        prefix = f"{where}: " if where else ""
        for number, (role, text) in enumerate(turns):
            check_text(text, f"{prefix}turn {number} ({role})")
        if self.control_tokens:
            text = "".join(turn(role, text.strip()) for role, text in turns[:1] if role == "system")
            pieces = public_pieces(text + training_text(turns[1:] if text else turns, self.tokenizer.eos_token))
        else:
            pieces = training_pieces(turns, self.tokenizer.eos_token)
        in_front = check_places(pieces.count(PICTURE), images, where)
        begin = Piece(self.tokenizer.bos_token, "mark")
        return [PICTURE, begin, *pieces] if in_front else [begin, *pieces]

    def _ids(self, piece: Piece) -> list[int]:
        """Token ids of a piece of text; none of a picture."""
        if piece.kind == "picture":
            return []
        if piece.kind == "mark":
            return [self.tokenizer.convert_tokens_to_ids(piece.text)]
        if piece.text in self._known:
            return self._known[piece.text]
        return self.tokenizer.encode_text(piece.text, control_tokens=piece.kind == "control")

    def _assemble(self, pieces: Sequence[Piece], grids: list[Grid], tiles: Tiles) -> EncodedSample:
        """Joins the ids of texts and the spans of images, with labels where a piece is learnt."""
        ids: list[int] = []
        labels: list[int] = []
        mask: list[int] = []
        counts = (self.image_processor.token_count(grid) for grid in grids)
        for piece in pieces:
            picture = piece.kind == "picture"
            new = [self.pad_token_id] * next(counts) if picture else self._ids(piece)
            ids += new
            mask += [int(picture)] * len(new)
            masked = len(self._known[piece.header]) if piece.learnt and piece.header else 0
            labels += [IGNORE_INDEX] * masked + new[masked:] if piece.learnt else [IGNORE_INDEX] * len(new)
        return EncodedSample(np.array(ids, np.int32), np.array(labels, np.int32), np.array(mask, np.int32), grids,
                             tiles, self.image_processor.tokens_per_side)

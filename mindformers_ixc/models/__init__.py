"""The network of IXC2.5 and nothing else: cells, their strategies in parallel layouts, the training loss.

Shapes in docstrings and comments of the package have these letters, and no letter means two things:

    B   samples (or prompts) of a batch      H   query heads (of the vision tower: heads)
    L   positions of a sequence              KV  key/value heads
    T   tiles of a sample, with padding      G   query heads that share a key/value head, H = KV * G
    n   positions of a sample, unpadded      d   width of one head
    t   tiles of a sample, unpadded          S   positions of keys and values (in a cache: that it has room for)
    D   width of the language model          c   queries of a prompt that attend at once, a chunk
    C   width of the vision tower            V   pieces of the vocabulary, the classes of the loss
    P   side of a tile in pixels             F   features of a linear's input
    p   side of a patch in pixels            O   features of a linear's output
    g   patches along a side of a tile       r   rank of a low-rank pair
    k   tokens along a side of a tile,       R   sources of a mixture
        g = 2 * k                            N   length of a first axis, whatever it counts
"""
import mindformers  # noqa: F401 - first, so that registration finds no module here half imported (`mindformers_ixc`)

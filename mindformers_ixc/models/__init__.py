"""The network of IXC2.5 and nothing else: cells, their strategies in parallel layouts, the training loss.

Shapes in docstrings and comments have these letters, and no letter means two things:

    B   samples of a batch                   H   query heads (of the vision tower: heads)
    L   positions of a sequence              KV  key/value heads
    T   tiles of a sample                    G   query heads that share a key/value head, H = KV * G
    D   width of the language model          d   width of one head
    C   width of the vision tower            V   pieces of the vocabulary
    P   side of a tile in pixels             S   positions a key/value cache has room for
    N   rows of a product, whatever of       F   features of a linear's input
    g   patches along a side of a tile       p   side of a patch in pixels
    R   sources of a mixture                 r   rank of a low-rank pair
"""
import mindformers  # noqa: F401 - first, so that registration finds no module here half imported (`mindformers_ixc`)

"""What crosses from host to device: the columns of a batch, documented here and nowhere else.

With B samples, L = `seq_length` positions, T = `max_tiles` tiles of S x S pixels and n tokens a tile:

| column | type | shape | holds |
|---|---|---|---|
| input_ids | int32 | (B, L) | token ids; the padding id at image positions and in the padding on the right |
| labels | int32 | (B, L) | already shifted: the target of each position, -100 where there is no loss |
| pixel_values | float32 | (B, T, 3, S, S) | normalised tiles, zeros after them |
| vision_index | int32 | (B, L) | row of the vision table each image position takes; 0 elsewhere |
| image_mask | int32 | (B, L) | 1 on image positions |

Of each picture the global view comes first, then its tiles row by row. The vision table of a sample has T * n + 2 rows:
those of its tiles in order, then sub_GN, then glb_GN.
"""

BATCH_COLUMNS = ("input_ids", "labels", "pixel_values", "vision_index", "image_mask")

"""Logical axis names: what a dimension means. `crescendo.parallel.rules` says where each one lives.

The shape letters used in names such as `x_BTD`:

| letter | axis | letter | axis |
| --- | --- | --- | --- |
| B | batch (examples) | K | key and value heads |
| T | length (tokens) | G | query heads in a group, H / K |
| D | embed, the residual width | F | mlp, the feed-forward width |
| H | query heads | V | vocabulary |
| E | width of one head | L | layers |
| X | experts | C | experts of a token |
"""

BATCH = "batch"
LENGTH = "length"
RESIDUAL_LENGTH = "residual_length"  # tokens of the residual stream and its norms: may be split finer than elsewhere
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_WIDTH = "head_width"
MLP = "mlp"
EXPERTS = "experts"
ROUTES = "routes"  # the experts as a router's outputs: every device chooses among all
VOCAB = "vocab"
LAYERS = "layers"
WINDOW = "window"  # the height and the width of a convolution's kernel
IN_CHANNELS = "in_channels"
CHANNELS = "channels"
CLASSES = "classes"
PATCH = "patch"  # the values of a patch of a picture
PLACES = "places"  # where a patch can lie

# Left to itself the partitioner may split activations like the parameters.
RESIDUAL = (BATCH, RESIDUAL_LENGTH, None)
# What matmuls take in: where they split their outputs over devices, each needs all the tokens.
TAKEN_IN = (BATCH, LENGTH, None)

ALL = (
    *(BATCH, LENGTH, RESIDUAL_LENGTH, EMBED, HEADS, KV_HEADS, HEAD_WIDTH, MLP, EXPERTS, ROUTES, VOCAB, LAYERS),
    *(WINDOW, IN_CHANNELS, CHANNELS, CLASSES, PATCH, PLACES),
)

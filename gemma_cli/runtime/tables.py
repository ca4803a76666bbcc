"""What kernels know of a model: its shape, and tables of where its weights lie and how."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantize import packing

# The formats of a matrix; int4 with equal steps needs no codebook.
INT4, INT4_CODEBOOK, INT8, PLANES, BF16, F32 = range(6)

# Columns of the table that describes matrices to the kernels, int64.
ADDRESS, FORMAT, N_TILES, N_IN, GROUP_SIZE, CODEBOOK, SCALES = range(7)
N_COLUMNS = 7

# Bytes of the scales that open a block, as a matrix has them in the column SCALES.
HALF_SCALES, DOUBLE_SCALES = packing.scale_bytes("int4"), packing.scale_bytes("int4_dq")

# Rows of the table of matrices: these seven for every layer, then the embedding.
Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")

# Columns of the table of norms, a row a layer and one for the final norm in its first column;
# the address of float32 weights, 0 for a norm that the architecture does not have.
ATTN_NORM, Q_NORM, K_NORM, POST_ATTN_NORM, FFN_NORM, POST_FFN_NORM = range(6)
NORMS = ("attn_norm", "q_norm", "k_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm")


class Shape(NamedTuple):
    """What the kernels need to know of a GemmaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    sliding_window: int
    rms_norm_eps: float
    query_scale: float
    attention_soft_cap: float
    final_soft_cap: float


class Weights(NamedTuple):
    """Addresses of everything that is read from the mapping, and the layers' kinds."""

    matrices: NDArray[np.int64]  # (7 n_layers + 1, N_COLUMNS)
    norms: NDArray[np.int64]  # (n_layers + 1, 6)
    slides: NDArray[np.bool_]  # (n_layers,)
    frequencies: NDArray[np.float64]  # (2 global or sliding, head_dim / 2), of rotary positions
    exact: bool  # no matrix is rounded to codes
    remainders: NDArray[np.float64]  # (3, 2), packing.remainders of an output head in planes

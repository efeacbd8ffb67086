"""How a launch finds its elements: a table of tensors, a work list of tiles, and loads and stores of every dtype.

One program handles one tile, of at most `TILE` elements of one tensor. Lane `i` of a tile stands for the element

    base + (i >> log_period) * pitch + (i & (period - 1))        where period = 2^log_period >= pitch,

if that is below `base + length` and `i & (period - 1)` is below `pitch`. With period = pitch = TILE that is a run of
neighbours; with pitch = a multiple of the rank (B of LoRA, whose rank runs along the columns) lanes that share
`i & (period - 1)` share their rank, so a rank's elements can be added up by reshaping. pitch is a multiple of four, and
so is base plus the offset of the first element in the tensor of which this may be a piece: four neighbouring lanes
always hold the four elements of one call of Philox, and (but for scattered tiles) one 16-byte vector.

The table and the work list are int64, so one upload carries addresses, sizes and everything else.
"""

import triton
import triton.language as tl

# Columns of the tensor table.
PARAM = tl.constexpr(0)  # address of the parameter
MEAN = tl.constexpr(1)  # address the mean is read from (fp32)
MEAN_OUT = tl.constexpr(2)  # address that gets a copy of the mean (fp32), or 0
MOMENTUM = tl.constexpr(3)
HESS = tl.constexpr(4)
GRAD = tl.constexpr(5)
BANKED_GRAD = tl.constexpr(6)
BANKED_CURVATURE = tl.constexpr(7)
MASK = tl.constexpr(8)  # address of the hard rank mask (one byte per rank), or 0
INDEX = tl.constexpr(9)  # index of the parameter in the optimizer: its identity for the noise
OFFSET = tl.constexpr(10)  # of the first element within the whole tensor of which this is a piece; else 0
RANK = tl.constexpr(11)  # r, or 1
RANK_RECIPROCAL = tl.constexpr(12)  # see `_divided`
INNER_RECIPROCAL = tl.constexpr(13)  # of the number of elements between two ranks
SLOT = tl.constexpr(14)  # first of its r slots among the sums of the scores, or -1
SENSITIVITY = tl.constexpr(15)
UNCERTAINTY = tl.constexpr(16)
OWN_DECAY = tl.constexpr(17)  # address of the tensor's delta (fp32), or 0 for the call's
MOMENTS = tl.constexpr(18)  # address of the sums behind the tensor's next delta, see `prior`; or 0: delta stays
NUMEL = tl.constexpr(19)
TILES = tl.constexpr(20)  # how many items of the work list are the tensor's
ADAPTER = tl.constexpr(21)  # number of the adapter whose ranks the tensor scores, or -1
ADAPTER_TILES = tl.constexpr(22)  # items of the work list that are the adapter's; 1 where there is none
TENSOR_COLUMNS = tl.constexpr(23)

# Columns of the work list.
ITEM_TENSOR = tl.constexpr(0)
ITEM_BASE = tl.constexpr(1)
ITEM_LENGTH = tl.constexpr(2)
ITEM_KIND = tl.constexpr(3)
ITEM_LOG_PERIOD = tl.constexpr(4)
ITEM_PITCH = tl.constexpr(5)
ITEM_RANK = tl.constexpr(6)  # rank of the element at the base
ITEM_NEXT = tl.constexpr(7)  # elements from the base to the first one of another rank, or TILE if it is beyond that
ITEM_COLUMNS = tl.constexpr(8)

#: largest tile for which `ranks` is exact
LARGEST = tl.constexpr(1 << 15)

# Kinds of tiles. All but SCATTERED have addresses and limits that are multiples of 16 bytes.
SCATTERED = tl.constexpr(0)  # any addresses, any limits, any mixture of ranks; element by element
RUN = tl.constexpr(1)  # neighbours that share one rank, or belong to no rank
PERIODIC = tl.constexpr(2)  # lanes that share `i & (period - 1)` share their rank; the period is SHORT_PERIOD or TILE
LONG = tl.constexpr(3)  # a period of TILE lanes: several ranks, none of them twice within fewer lanes

#: long enough to hold a whole number of rows of most ranks without many idle lanes, short enough to save atomics
SHORT_PERIOD = tl.constexpr(128)

# Columns of the scalars: one row for the call, and one for the sample that a step may draw at its end. fp32 numbers are
# kept as their bit patterns.
SEED = tl.constexpr(0)
C1 = tl.constexpr(1)
STEP = tl.constexpr(2)
ESS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
LR = tl.constexpr(5)
BETA1 = tl.constexpr(6)
BETA1_COMPLEMENT = tl.constexpr(7)
RHO = tl.constexpr(8)
CLIP_RADIUS = tl.constexpr(9)
DEBIAS = tl.constexpr(10)
N_SAMPLES = tl.constexpr(11)
SQUARE_SCALE = tl.constexpr(12)
INVERSE_BATCH = tl.constexpr(13)
NOISE_ESS = tl.constexpr(14)
SIGN = tl.constexpr(15)  # of the normals
PRIOR_WEIGHT = tl.constexpr(16)
PRIOR_DUE = tl.constexpr(17)  # 1 in a step after which tensors with `MOMENTS` get another delta; not fp32
LOWEST_DECAY = tl.constexpr(18)
HIGHEST_DECAY = tl.constexpr(19)
SCALAR_COLUMNS = tl.constexpr(20)

#: dtypes of parameters and gradients, as the constexpr arguments of the kernels take them
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


@triton.jit
def scalar(row, COLUMN: tl.constexpr):
    """One fp32 scalar of a row."""
    return tl.load(row + COLUMN).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weight_decay(row, scalars):
    """delta of a tensor: its own, or that of a row of scalars."""
    own = tl.load(row + OWN_DECAY)
    return tl.load(own.to(tl.pointer_type(tl.float32)), mask=own != 0, other=scalar(scalars, WEIGHT_DECAY))


@triton.jit
def floats(row, COLUMN: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to fp32 from the tensor table; vector tiles promise that it is a multiple of 16 bytes."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(tl.float32))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def anything(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to a tensor of any dtype; bfloat16 is read and written as its bit pattern."""
    if DTYPE == 1:
        pointer = tl.load(row + COLUMN).to(tl.pointer_type(tl.int16))
    elif DTYPE == 2:
        pointer = tl.load(row + COLUMN).to(tl.pointer_type(tl.float16))
    else:
        pointer = tl.load(row + COLUMN).to(tl.pointer_type(tl.float32))
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def distances(item, lane, VECTOR: tl.constexpr):
    """How far behind a tile's base the elements of some lanes are; those of scattered tiles are neighbours."""
    distance = lane
    if VECTOR:
        log_period, pitch = tl.load(item + ITEM_LOG_PERIOD).to(tl.int32), tl.load(item + ITEM_PITCH).to(tl.int32)
        distance = (lane >> log_period) * pitch + (lane & ((1 << log_period) - 1))
    return distance


@triton.jit
def existing(item, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Which lanes of a tile stand for an element."""
    lane = tl.arange(0, TILE)
    exists = distances(item, lane, VECTOR) < tl.load(item + ITEM_LENGTH).to(tl.int32)
    if VECTOR:
        log_period, pitch = tl.load(item + ITEM_LOG_PERIOD).to(tl.int32), tl.load(item + ITEM_PITCH).to(tl.int32)
        exists = tl.max_constancy(exists & ((lane & ((1 << log_period) - 1)) < pitch), 4)
    else:
        exists = exists & (lane >= tl.maximum(-tl.load(item + ITEM_BASE), 0).to(tl.int32))  # it may begin within a quad
    return exists


@triton.jit
def lanes(item, row, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets (int64 [TILE]) of a tile's elements, which of them exist, and the numbers (int64 [TILE / 4]) of quads.

    Offsets count from the piece's first element, quads from the whole tensor's.
    """
    base = tl.load(item + ITEM_BASE)
    offsets = base + distances(item, tl.arange(0, TILE), VECTOR)
    if VECTOR:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, 4), 4)
    quads = (tl.load(row + OFFSET) + base + distances(item, tl.arange(0, TILE // 4) * 4, VECTOR)) >> 2
    return offsets, existing(item, TILE, VECTOR), quads


@triton.jit
def _divided(x, reciprocal):
    """x // d of int32 numbers x >= 0, where `reciprocal` is floor((2^32 - 1) / d).

    Exact if (x + 1) d <= 2^32, and (it is 0) if x < d: the product lies below the true one by at most (x + 1) / 2^32,
    less than what (x + 1) / d exceeds floor(x / d) by, which is at least 1 / d.
    """
    return tl.umulhi((x + 1).to(tl.uint32), reciprocal).to(tl.int32)


@triton.jit
def ranks(item, row, distance):
    """Rank of the elements at these distances (int32) from a tile's base.

    There is no division: the host says where the tile begins, and how to divide.
    """
    beyond = distance - tl.load(item + ITEM_NEXT).to(tl.int32)
    turns = tl.where(beyond >= 0, _divided(beyond, tl.load(row + INNER_RECIPROCAL).to(tl.uint32)) + 1, 0)
    r = tl.load(row + RANK).to(tl.int32)
    turns -= _divided(turns, tl.load(row + RANK_RECIPROCAL).to(tl.uint32)) * r
    rank = tl.load(item + ITEM_RANK).to(tl.int32) + turns
    return tl.where(rank >= r, rank - r, rank)


@triton.jit
def load(pointer, offsets, exists, DTYPE: tl.constexpr):
    """fp32 values of a tensor of any dtype; 0 for lanes without an element."""
    if DTYPE == 1:
        value = (tl.load(pointer + offsets, mask=exists, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(pointer + offsets, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit
def bfloat16_pattern(value):
    """fp32 -> bit pattern of the nearest bfloat16 (ties to even; every NaN becomes the same one), in the low half.

    Triton's interpreter truncates in its own conversion.
    """
    pattern = value.to(tl.int32, bitcast=True)
    nearest = (pattern + (0x7FFF + ((pattern >> 16) & 1))) >> 16
    return tl.where(value == value, nearest, 0x7FC0)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp32 values as they are after a visit to a dtype."""
    if DTYPE == 1:
        value = (bfloat16_pattern(value) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == 2:
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def store(pointer, offsets, value, exists, DTYPE: tl.constexpr):
    """Write fp32 values into a tensor of any dtype, rounded to nearest even."""
    if DTYPE == 1:
        tl.store(pointer + offsets, bfloat16_pattern(value).to(tl.int16), mask=exists)
    elif DTYPE == 2:
        tl.store(pointer + offsets, value.to(tl.float16), mask=exists)
    else:
        tl.store(pointer + offsets, value, mask=exists)


@triton.jit
def active(item, row, exists, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """False where a hard-masked rank must neither move nor get noise."""
    mask = tl.load(row + MASK)
    at = mask.to(tl.pointer_type(tl.int8))
    if tl.load(item + ITEM_NEXT) == TILE:  # all are of one rank, or of none
        alive = tl.zeros((TILE,), tl.int8) + tl.load(at + tl.load(item + ITEM_RANK), mask=mask != 0, other=1)
    else:
        rank = ranks(item, row, distances(item, tl.arange(0, TILE), VECTOR))
        has_mask = tl.zeros_like(rank) + mask != 0  # a block, as the interpreter wants it
        alive = tl.load(at + rank, mask=exists & has_mask, other=1)
    return alive != 0

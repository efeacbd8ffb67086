"""How a program finds its elements: a row of the table, a tile of that tensor, and loads and stores of every dtype.

A program handles one tile, at most `TILE` neighbouring elements of one tensor. A tile is made of lines of 128 lanes; a
line holds `LINE` elements: 128, or for a tensor whose rank runs along the columns (B of LoRA) as many as are a whole
number of its rows, so that lane `i` of every line of every tile is of the same rank. Lines start at multiples of four
elements: four neighbouring lanes hold the four elements of one call of Philox, and mostly one 16-byte vector.

Glossary, for all kernels:
    row        of the table: what is known of one tensor, int64 [N_COLUMNS]
    tile       what one program handles: `SPAN` elements or fewer; its number counts within the tensor
    item       8 bytes of the work list: the row in the high half, the number of the tile in the low one; the ranks of
               the tiles follow behind all items, for those that ask: see `tile_rank`
    lane       position within a tile, 0 to TILE - 1
    distance   elements between the first of a tile and that of a lane
    offset     of an element from the tensor's first in this process, which is `OFFSET` elements into a sharded tensor
    quad       four elements of one call of Philox
    rank       (element // INNER) % RANKS, where element counts in the whole tensor; a tensor without ranks is one rank
    slot       a rank among all ranks whose elements are added up
"""

import triton
import triton.language as tl

# Columns of the table. The first ones are addresses of the tensors in the roles of `Batch`, 0 for none.
PARAM = tl.constexpr(0)
MEAN = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
HESS = tl.constexpr(3)
GRAD = tl.constexpr(4)
BANKED_GRAD = tl.constexpr(5)
BANKED_CURVATURE = tl.constexpr(6)
SENSITIVITY = tl.constexpr(7)
UNCERTAINTY = tl.constexpr(8)
RANK_MASK = tl.constexpr(9)
GROUP = tl.constexpr(10)  # number of its scalars
INDEX = tl.constexpr(11)  # of the parameter in the optimizer: its identity for the noise
OFFSET = tl.constexpr(12)
NUMEL = tl.constexpr(13)
RANKS = tl.constexpr(14)
INNER = tl.constexpr(15)
ALIGNED = tl.constexpr(16)  # 1 where addresses are multiples of 16 bytes, and OFFSET of 4 elements
KIND = tl.constexpr(17)
LINE = tl.constexpr(18)
SPAN = tl.constexpr(19)  # elements of a tile
RANKS_RECIPROCAL = tl.constexpr(20)  # see `divide`
INNER_RECIPROCAL = tl.constexpr(21)
SLOT = tl.constexpr(22)  # of the first rank, or -1
N_COLUMNS = tl.constexpr(23)

# Kinds of tensors, by the ranks in a tile.
ONE_RANK = tl.constexpr(0)  # as A has it
PERIODIC = tl.constexpr(1)  # as B has it: lanes that are 128 apart share their rank, in all tiles the same
MIXED = tl.constexpr(2)

LANES = tl.constexpr(128)
#: largest tile for which `divide` is exact
LARGEST = tl.constexpr(1 << 15)


@triton.jit
def locate(rows_ptr, items_ptr, hyper_ptr, N_HYPER: tl.constexpr):
    """The tile of this program.

    Returns its row, the scalars of its group, the offset of its first element (int64, negative where it starts before
    the tensor), and how far it reaches (int32).
    """
    item = tl.load(items_ptr + tl.program_id(0))
    row_ptr, number = rows_ptr + (item >> 32) * N_COLUMNS, item.to(tl.int32)
    span = tl.load(row_ptr + SPAN)
    start = number * span - (tl.load(row_ptr + OFFSET) & 3)
    length = tl.minimum(tl.load(row_ptr + NUMEL) - start, span).to(tl.int32)
    return row_ptr, hyper_ptr + tl.load(row_ptr + GROUP) * N_HYPER, start, length


@triton.jit
def distances(row_ptr, lane, VECTOR: tl.constexpr):
    """Distances of some lanes (int32 block); without vectors lanes are neighbours, whatever the line."""
    distance = lane
    if VECTOR:
        distance = (lane >> 7) * tl.load(row_ptr + LINE).to(tl.int32) + (lane & (LANES - 1))
    return distance


@triton.jit
def existing(row_ptr, start, length, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Which lanes stand for an element: bool [TILE]."""
    lane = tl.arange(0, TILE)
    exists = distances(row_ptr, lane, VECTOR) < length
    if VECTOR:
        exists = tl.max_constancy(exists & ((lane & (LANES - 1)) < tl.load(row_ptr + LINE).to(tl.int32)), 4)
    else:
        exists = exists & (start + lane >= 0)
    return exists


@triton.jit
def offsets(row_ptr, start, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of the lanes' elements: int64 [TILE]."""
    offset = start + distances(row_ptr, tl.arange(0, TILE), VECTOR)
    if VECTOR:
        offset = tl.max_contiguous(tl.multiple_of(offset, 4), 4)
    return offset


@triton.jit
def quads(row_ptr, start, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Quads of the lanes' elements: int64 [TILE / 4]."""
    return (tl.load(row_ptr + OFFSET) + start + distances(row_ptr, tl.arange(0, TILE // 4) * 4, VECTOR)) >> 2


@triton.jit
def is_vector(row_ptr, length):
    """Whether a tile can be read in 16-byte vectors."""
    return (tl.load(row_ptr + ALIGNED) != 0) & (length % 4 == 0)


@triton.jit
def pointer(row_ptr, ROLE: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to the tensor in a role; bf16 is read and written as its bit pattern."""
    if DTYPE == "bf16":
        at = tl.load(row_ptr + ROLE).to(tl.pointer_type(tl.int16))
    elif DTYPE == "fp16":
        at = tl.load(row_ptr + ROLE).to(tl.pointer_type(tl.float16))
    else:
        at = tl.load(row_ptr + ROLE).to(tl.pointer_type(tl.float32))
    if VECTOR:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def load(row_ptr, ROLE: tl.constexpr, offset, exists, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Values of the tensor in a role: fp32 [TILE]; 1 for lanes without an element, as dividing 0 is slow."""
    at = pointer(row_ptr, ROLE, DTYPE, VECTOR) + offset
    if DTYPE == "bf16":
        value = (tl.load(at, mask=exists, other=0x3F80).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(at, mask=exists, other=1.0).to(tl.float32)
    return value


@triton.jit
def store(row_ptr, ROLE: tl.constexpr, offset, value, exists, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Write fp32 values into the tensor in a role, rounded to nearest even."""
    at = pointer(row_ptr, ROLE, DTYPE, VECTOR) + offset
    if DTYPE == "bf16":
        tl.store(at, bfloat16_pattern(value).to(tl.int16), mask=exists)
    elif DTYPE == "fp16":
        tl.store(at, value.to(tl.float16), mask=exists)
    else:
        tl.store(at, value, mask=exists)


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
    if DTYPE == "bf16":
        value = (bfloat16_pattern(value) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "fp16":
        value = value.to(tl.float16).to(tl.float32)
    return value


# ---------------------------------------------------------------- ranks


@triton.jit
def divide(x, reciprocal):
    """x // d of int32 numbers x >= 0, where `reciprocal` is floor((2^32 - 1) / d).

    Exact if (x + 1) d <= 2^32, and (it is 0) if x < d: the product lies below the true one by at most (x + 1) / 2^32,
    less than what (x + 1) / d exceeds floor(x / d) by, which is at least 1 / d.
    """
    return tl.umulhi((x + 1).to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)


@triton.jit
def rank_at(element, ranks, inner, TILE: tl.constexpr):
    """Rank of an element of the whole tensor, and how far behind it another rank begins, at most TILE: int64."""
    row = element // inner
    return row % ranks, tl.minimum((row + 1) * inner - element, TILE)


@triton.jit
def ranks_behind(rank, change, distance, ranks, ranks_reciprocal, inner_reciprocal):
    """Ranks of the elements at these distances (int32 block) behind one whose `rank_at` is known; without division."""
    beyond, r = distance - change, ranks.to(tl.int32)
    turns = tl.where(beyond >= 0, divide(beyond, inner_reciprocal) + 1, 0)
    rank = rank + turns - divide(turns, ranks_reciprocal) * r
    return tl.where(rank >= r, rank - r, rank)


@triton.jit
def tile_rank(items_ptr):
    """`rank_at` of the first lane of this program's tile, as the work list says it: int32."""
    both = tl.load(items_ptr + tl.num_programs(0) + tl.program_id(0))
    return (both >> 32).to(tl.int32), both.to(tl.int32)


@triton.jit
def lane_ranks(row_ptr, rank, change, distance):
    """Ranks of the lanes at these distances (int32 block); rank, change: of `tile_rank`."""
    reciprocals = tl.load(row_ptr + RANKS_RECIPROCAL), tl.load(row_ptr + INNER_RECIPROCAL)
    return ranks_behind(rank, change, distance, tl.load(row_ptr + RANKS), reciprocals[0], reciprocals[1])


@triton.jit
def is_dead(row_ptr, rank):
    """Whether all of a tile is of one rank, and that is masked."""
    mask = tl.load(row_ptr + RANK_MASK)
    at = mask.to(tl.pointer_type(tl.int8)) + rank
    return tl.load(at, mask=(mask != 0) & (tl.load(row_ptr + KIND) == ONE_RANK), other=1) == 0


@triton.jit
def active(row_ptr, rank, change, exists, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """False where a masked rank must neither move nor get noise: bool [TILE]."""
    mask = tl.load(row_ptr + RANK_MASK)
    at = mask.to(tl.pointer_type(tl.int8))
    if tl.load(row_ptr + KIND) == ONE_RANK:
        alive = tl.zeros((TILE,), tl.int8) + tl.load(at + rank, mask=mask != 0, other=1)
    else:
        ranks = lane_ranks(row_ptr, rank, change, distances(row_ptr, tl.arange(0, TILE), VECTOR))
        has_mask = tl.zeros_like(ranks) + mask != 0  # a block, as the interpreter wants it
        alive = tl.load(at + ranks, mask=exists & has_mask, other=1)
    return alive != 0

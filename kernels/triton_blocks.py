"""Which tokens of a row one program of the second pass reads, listed in the workspace.

They are read in blocks of TILE tokens. If only the support counts, a block is of 128 cells that may
hold a token of it, from any tiles, or of a whole tile if those cells are many. Nearly always one
block is all of them. Otherwise a block is a tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_measure import (
    CAPACITY,
    MARKS,
    STATISTICS,
    is_active,
    numbers,
    shape_of,
    words_of,
)
from .triton_rows import INF


class Blocks(NamedTuple):
    """The list of a row: in order, the first token of each cell or of each tile."""

    place: tl.tensor
    length: tl.tensor
    whole: tl.tensor  # whether it is one of tiles
    number: tl.tensor  # of blocks


@triton.constexpr_function
def room_for(LANES):
    """The power of two that a tensor with a number per tile needs."""
    return triton.next_power_of_2(LANES)


@triton.jit
def bits_set(word):
    """How many bits of a uint32 are set."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def add_2_and_max(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, tl.maximum(c, other_c)


@triton.jit
def list_blocks(
    workspace, row, vocab, steering,
    CHUNK: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List the cells marked in tiles with support, or these tiles if the cells are too many."""
    WORDS: tl.constexpr = words_of(CHUNK, TILE)[0]
    BITS: tl.constexpr = words_of(CHUNK, TILE)[1]
    count = tl.cdiv(vocab, TILE)
    place = numbers(workspace, row, count)
    word = tl.arange(0, room_for(LANES) * WORDS)
    tile = word // WORDS
    active = is_active(tl.load(place + tile, tile < count, other=-INF), steering, True)
    marks = place.to(tl.pointer_type(tl.uint32)) + (MARKS + word % WORDS) * count + tile
    bits = tl.load(marks, active, other=0)
    marked = bits_set(bits)
    is_tile = active & (word % WORDS == 0)
    tiles, cells, most = tl.reduce((is_tile.to(tl.int32), marked, marked), 0, add_2_and_max)
    whole = cells > CAPACITY
    bits = tl.where(whole, is_tile.to(tl.uint32), bits)
    entries = tl.where(whole, is_tile.to(tl.int32), marked)
    first = tile * TILE + tl.where(whole, 0, word % WORDS * BITS * CHUNK)
    slots = place.to(tl.pointer_type(tl.int32)) + STATISTICS * count
    slots_of_word = slots + tl.cumsum(entries, 0) - entries
    for i in tl.range(0, tl.where(whole, 1, most)):
        rest = bits & (bits - 1)
        power = (bits ^ rest).to(tl.float32)  # of two: its exponent is the number of the bit
        bit = (power.to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(slots_of_word + i, first + bit * CHUNK, bits != 0)
        bits = rest
    tl.debug_barrier()
    number = tl.where(whole, tiles, tl.cdiv(cells, WORDS * BITS))
    return Blocks(slots, tl.where(whole, tiles, cells), whole, number)


@triton.jit
def list_tiles(
    workspace, row, vocab, steering,
    REMOVE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List the active tiles."""
    count = tl.cdiv(vocab, TILE)
    place = numbers(workspace, row, count)
    tile = tl.arange(0, room_for(LANES))
    active = is_active(tl.load(place + tile, tile < count, other=-INF), steering, REMOVE)
    entries = active.to(tl.int32)
    slots = place.to(tl.pointer_type(tl.int32)) + STATISTICS * count
    tl.store(slots + tl.cumsum(entries, 0) - entries, tile * TILE, active)
    tl.debug_barrier()
    tiles = tl.sum(entries)
    return Blocks(slots, tiles, tl.cast(1, tl.int1), tiles)


@triton.jit
def first_token(blocks, block, cell, vocab, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The first token of a cell of a block; `vocab` or more where none is."""
    slot = tl.where(blocks.whole, block, block * shape_of(CHUNK, TILE)[1] + cell)
    first = tl.load(blocks.place + slot, slot < blocks.length, other=vocab)
    return tl.multiple_of(first + tl.where(blocks.whole, cell * CHUNK, 0), CHUNK)


@triton.jit
def tokens_of_tile(blocks, block, TILE: tl.constexpr):
    """The tokens of a block in order, if the list is one of tiles."""
    return tl.multiple_of(tl.load(blocks.place + block), TILE) + tl.arange(0, TILE)


@triton.jit
def tokens_of(blocks, block, vocab, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The tokens of a block, `[round, cell, place in the chunk]`; `vocab` or more where none is.

    In each lane the tokens of later blocks have higher ids.
    """
    ROUNDS: tl.constexpr = shape_of(CHUNK, TILE)[0]
    CELLS: tl.constexpr = shape_of(CHUNK, TILE)[1]
    first = first_token(blocks, block, tl.arange(0, CELLS), vocab, CHUNK, TILE)
    start = tl.arange(0, ROUNDS) * (CELLS * CHUNK)
    return start[:, None, None] + first[None, :, None] + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def tokens_of_lane(blocks, block, lane, vocab, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The tokens that `tokens_of` and then `flat` have in one lane, of several blocks."""
    CELLS: tl.constexpr = shape_of(CHUNK, TILE)[1]
    first = first_token(blocks, block, lane // CHUNK % CELLS, vocab, CHUNK, TILE)
    return lane // (CELLS * CHUNK) * (CELLS * CHUNK) + first + lane % CHUNK


@triton.jit
def flat(block, TILE: tl.constexpr):
    """A block's lanes in a row, for a reduction."""
    return tl.reshape(block, (TILE,))

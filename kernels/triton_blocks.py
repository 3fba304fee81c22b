"""Which tokens of a row one program of the second pass reads, listed in the workspace.

They are read in blocks of TILE tokens. If only the support counts, a block is of 128 cells that may
hold a token of it, from any tiles, or of a whole tile if those cells are many. Nearly always one
block is all of them. Otherwise a block is a tile.

A cell has tokens all over its tile. Where their order counts, the chunks of the cells are listed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_measure import (
    ENTRIES,
    MARKS,
    STATISTICS,
    is_active,
    numbers,
    shape_of,
    words_of,
)
from .triton_rows import INF

CAPACITY = tl.constexpr(512)  # of more cells than these the tiles are listed


class Blocks(NamedTuple):
    """The list of a row: in order, the first token of each cell, each chunk or each tile."""

    place: tl.tensor
    length: tl.tensor
    whole: tl.tensor  # whether it is one of tiles
    number: tl.tensor  # of blocks


@triton.constexpr_function
def room_for(LANES):
    """The power of two that a tensor with a number per tile needs."""
    return triton.next_power_of_2(LANES)


@triton.constexpr_function
def shape_in_order(CHUNK, TILE):
    """A block whose tokens are in order: one round of chunks, each of them listed."""
    return 1, TILE // CHUNK, CHUNK


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
def count_in_tile(entries, WORDS: tl.constexpr):
    """Of the words of each tile: the sum of their entries, and of those before each word."""
    entries_of_tile = tl.reshape(entries, (entries.shape[0] // WORDS, WORDS))
    total = tl.broadcast_to(tl.sum(entries_of_tile, 1, keep_dims=True), entries_of_tile.shape)
    before = tl.cumsum(entries_of_tile, 1) - entries_of_tile
    return tl.reshape(total, entries.shape), tl.reshape(before, entries.shape)


@triton.jit
def list_blocks(
    workspace, row, vocab, steering,
    SHAPE: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List the cells marked in tiles with support, or these tiles if the cells are too many.

    A cell is as many entries as it has parts, all its rounds or, in order, one for each.
    """
    CHUNK: tl.constexpr = SHAPE[2]
    WORDS: tl.constexpr = words_of(CHUNK, TILE)[0]
    BITS: tl.constexpr = words_of(CHUNK, TILE)[1]
    PARTS: tl.constexpr = shape_of(CHUNK, TILE)[0] // SHAPE[0]
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
    whole = (cells > CAPACITY) | (cells * PARTS > ENTRIES)
    bits = tl.where(whole, is_tile.to(tl.uint32), bits)
    entries = tl.where(whole, is_tile.to(tl.int32), marked)
    first = tile * TILE + tl.where(whole, 0, word % WORDS * BITS * CHUNK)
    slots = place.to(tl.pointer_type(tl.int32)) + STATISTICS * count
    before = tl.cumsum(entries, 0) - entries
    slots_of_word = slots + before
    parts, apart = tl.where(whole, 1, PARTS), 0
    if PARTS > 1:
        # The first parts of the tile's cells come first, then their second parts.
        apart, in_tile = count_in_tile(entries, WORDS)
        slots_of_word += (parts - 1) * (before - in_tile)
    for i in tl.range(0, tl.where(whole, 1, most)):
        rest = bits & (bits - 1)
        power = (bits ^ rest).to(tl.float32)  # of two: its exponent is the number of the bit
        bit = (power.to(tl.int32, bitcast=True) >> 23) - 127
        for part in tl.range(0, parts):
            token = first + bit * CHUNK + part * (BITS * WORDS * CHUNK)
            tl.store(slots_of_word + i + part * apart, token, bits != 0)
        bits = rest
    tl.debug_barrier()
    number = tl.where(whole, tiles, tl.cdiv(cells, WORDS * BITS))
    return Blocks(slots, tl.where(whole, tiles, cells * PARTS), whole, number)


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
def first_token(blocks, block, entry, vocab, SHAPE: tl.constexpr):
    """The first token of an entry of a block; `vocab` or more where none is."""
    CHUNK: tl.constexpr = SHAPE[2]
    slot = tl.where(blocks.whole, block, block * SHAPE[1] + entry)
    first = tl.load(blocks.place + slot, slot < blocks.length, other=vocab)
    return tl.multiple_of(first + tl.where(blocks.whole, entry * CHUNK, 0), CHUNK)


@triton.jit
def tokens_of(blocks, block, vocab, SHAPE: tl.constexpr):
    """The tokens of a block, `[round, entry, place in the chunk]`; `vocab` or more where none is.

    In each lane the tokens of later blocks have higher ids.
    """
    first = first_token(blocks, block, tl.arange(0, SHAPE[1]), vocab, SHAPE)
    start = tl.arange(0, SHAPE[0]) * (SHAPE[1] * SHAPE[2])
    return start[:, None, None] + first[None, :, None] + tl.arange(0, SHAPE[2])[None, None, :]


@triton.jit
def tokens_of_lane(blocks, block, lane, vocab, SHAPE: tl.constexpr):
    """The tokens that `tokens_of` and then `flat` have in one lane, of several blocks."""
    CELLS: tl.constexpr = SHAPE[1]
    CHUNK: tl.constexpr = SHAPE[2]
    first = first_token(blocks, block, lane // CHUNK % CELLS, vocab, SHAPE)
    return lane // (CELLS * CHUNK) * (CELLS * CHUNK) + first + lane % CHUNK


@triton.jit
def flat(block, TILE: tl.constexpr):
    """A block's lanes in a row, for a reduction."""
    return tl.reshape(block, (TILE,))


@triton.jit
def rank(some):
    """How many of some tokens come before each token of a block in order."""
    number = some.to(tl.int32)
    of_chunk = tl.sum(number, 2)
    before = tl.cumsum(of_chunk, 1) - of_chunk
    return before[:, :, None] + tl.cumsum(number, 2) - number

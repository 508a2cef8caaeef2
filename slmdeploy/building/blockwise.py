"""Weight-only quantisation in blocks: 4 or 8 bits with a scale (and optionally a zero point) per block of a row.

Knows nothing of profiles, files or gates. The layouts are those of ONNX Runtime's com.microsoft MatMulNBits (a linear
layer, accuracy_level 4: activations are quantised on the fly; without it decode is 50x slower) and GatherBlockQuantized
(an embedding). Rounding is not plain round-to-nearest: for 4 bits each block's scale is searched for the least squared
error of its weights, which needs no calibration data and costs seconds.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.rewriting import MICROSOFT, Replacement

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_SHRINKS = np.linspace(1.0, 0.62, 16, dtype=np.float32)
_REFITS = 2
_STRIPE = 1 << 16
"""Numbers that are searched together."""


@dataclass(frozen=True)
class Blocks:
    """A matrix of ``rows`` quantised along its second axis.

    values: uint8 [rows, blocks, block_size * bits / 8], the lower half of a byte first; scales: float32 [rows, blocks];
    zero_points: uint8 [rows, blocks * bits / 8 rounded up], or None for the middle of the range (8, 128).
    """

    values: Bytes
    scales: Floats
    zero_points: Bytes | None


def quantize_rows(matrix: Floats, *, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Quantise ``matrix`` [rows, K] in blocks along K; a K that is no multiple of the block is padded with zeros.

    A few rows at a time, which stay in the cache through all candidates of the search, and on all cores.
    """
    height = max(1, _STRIPE // max(1, matrix.shape[1]))
    stripes = [matrix[start : start + height] for start in range(0, len(matrix), height)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return join(list(pool.map(lambda stripe: _quantize_stripe(stripe, bits, block_size, symmetric), stripes)))


def join(stripes: list[Blocks]) -> Blocks:
    """The rows of one stripe behind those of another."""
    points = [blocks.zero_points for blocks in stripes if blocks.zero_points is not None]
    return Blocks(
        np.concatenate([blocks.values for blocks in stripes]),
        np.concatenate([blocks.scales for blocks in stripes]),
        np.concatenate(points) if points else None,
    )


def _quantize_stripe(matrix: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    grouped = padded.reshape(rows, blocks, block_size)
    scales, offsets = plain_scales(grouped, bits, symmetric)
    if bits == 4:  # with 256 levels clipping costs more than finer steps gain
        scales = _search(grouped, scales, offsets, bits)
    codes = round_codes(grouped, scales[..., None], offsets[..., None], bits).astype(np.uint8)
    zero_points = None if symmetric else pack(offsets.astype(np.uint8), bits)
    return Blocks(pack(codes, bits), scales, zero_points)


def round_codes(values: Floats, scales: Floats, offsets: Floats, bits: int) -> Floats:
    """The nearest code, 0 to 2**bits - 1, of each value; all three broadcast."""
    codes = np.rint(values / scales) + offsets
    return np.asarray(np.clip(codes, 0, 2**bits - 1), np.float32)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Two 4-bit codes to a byte along the last axis, the first in the lower half; an odd end is padded with zero."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """The codes that `pack` put together, with the zero that it added to an odd end."""
    if bits == 8:
        return packed
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)


def plain_scales(grouped: Floats, bits: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and offset, float32 [rows, blocks], that keep all of ``grouped`` [rows, blocks, block_size] in range.

    Symmetric: the scale's sign puts the block's extreme value on the longer, negative side of the range (for 4 bits at
    -7 of -8..7), the offset is the middle. Else the range goes from the smallest to the largest value, 0 included.
    """
    if symmetric:
        middle = np.full(grouped.shape[:2], 2 ** (bits - 1), np.float32)
        extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        return _nonzero(-extreme / (2 ** (bits - 1) - 1)), middle
    low = np.minimum(grouped.min(axis=-1), 0)
    scales = _nonzero((np.maximum(grouped.max(axis=-1), 0) - low) / (2**bits - 1))
    return scales, np.clip(np.rint(-low / scales), 0, 2**bits - 1)


def _nonzero(scales: Floats) -> Floats:
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def _search(grouped: Floats, first: Floats, offsets: Floats, bits: int) -> Floats:
    """The scales of least squared error for every block among ``first`` and smaller ones, refitted to their own codes.

    Plain rounding is the first candidate, so the search is never worse than that.
    """
    best, best_error = first, _squared_error(grouped, first, offsets, bits)
    for shrink in _SHRINKS:
        scales = first * shrink
        for _ in range(_REFITS + 1):
            error = _squared_error(grouped, scales, offsets, bits)
            better = error < best_error
            best_error, best = np.where(better, error, best_error), np.where(better, scales, best)
            scales = _refit(grouped, scales, offsets, bits)
    return best


def _squared_error(grouped: Floats, scales: Floats, offsets: Floats, bits: int) -> Floats:
    centred = round_codes(grouped, scales[..., None], offsets[..., None], bits) - offsets[..., None]
    difference = centred * scales[..., None] - grouped
    return np.asarray(np.einsum("rbk,rbk->rb", difference, difference), np.float32)


def _refit(grouped: Floats, scales: Floats, offsets: Floats, bits: int) -> Floats:
    """The least-squares scales for the codes that ``scales`` leads to; a block of zero codes keeps its scale."""
    centred = round_codes(grouped, scales[..., None], offsets[..., None], bits) - offsets[..., None]
    energy = np.einsum("rbk,rbk->rb", centred, centred)
    fitted = np.einsum("rbk,rbk->rb", centred, grouped) / np.where(energy > 0, energy, 1)
    return np.where(fitted != 0, fitted, scales).astype(np.float32)


def replace_matmul(node: ir.Node, weight: Floats, *, bits: int, block_size: int, symmetric: bool) -> None:
    """Put MatMulNBits in the place of ``node`` (x [..., K] times ``weight`` [K, N])."""
    blocks = quantize_rows(np.ascontiguousarray(weight.T), bits=bits, block_size=block_size, symmetric=symmetric)
    put_blocks(node, blocks, width=weight.shape[0], bits=bits, block_size=block_size)


def put_blocks(node: ir.Node, blocks: Blocks, *, width: int, bits: int, block_size: int) -> None:
    """Put MatMulNBits in the place of ``node``, a MatMul of rows of ``width`` with a weight that became ``blocks``."""
    new = Replacement(node)
    inputs = [node.inputs[0], new.constant(f"weight_int{bits}", blocks.values), new.constant("scales", blocks.scales)]
    if blocks.zero_points is not None:
        inputs.append(new.constant("zero_points", blocks.zero_points))
    product = new.add(
        "MatMulNBits",
        *inputs,
        domain=MICROSOFT,
        K=width,
        N=len(blocks.values),
        bits=bits,
        block_size=block_size,
        accuracy_level=4,
    )
    new.finish(product)


def replace_gather(node: ir.Node, table: Floats, *, bits: int, block_size: int, symmetric: bool) -> None:
    """Put GatherBlockQuantized in the place of ``node``, a Gather of rows of ``table`` [V, H].

    The operator takes H from its data, so the padding of a last, shorter block is cut off again.
    """
    rows, columns = table.shape
    blocks = quantize_rows(table, bits=bits, block_size=block_size, symmetric=symmetric)
    new = Replacement(node)
    flat = blocks.values.reshape(rows, -1)[:, : columns * bits // 8]
    inputs = [new.constant(f"weight_int{bits}", flat), node.inputs[1], new.constant("scales", blocks.scales)]
    if blocks.zero_points is not None:
        inputs.append(new.constant("zero_points", blocks.zero_points))
    gathered = new.add(
        "GatherBlockQuantized",
        *inputs,
        domain=MICROSOFT,
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    new.finish(gathered)

"""Fields of a few bits in a little-endian bit stream.

Shared by the formats whose codes are narrower than a byte; nothing here knows what a code means.
"""

from __future__ import annotations

from fewbit.torch_later import torch


def pack_bits(values: torch.Tensor, width: int) -> torch.Tensor:
    """Pack `width`-bit fields along the last axis, uint8 `[..., n]` to uint8 `[..., n * width / 8]`.

    Field i takes the stream's bits `[i * width, (i + 1) * width)`, and bit j of the stream is bit `j % 8`
    of byte `j // 8`. Raises `ValueError` where the stream does not end on a byte.
    """
    _check_width(width)
    if values.shape[-1] * width % 8:
        raise ValueError(f"{values.shape[-1]} fields of {width} bits do not fill whole bytes")
    shifts = torch.arange(width, dtype=torch.uint8, device=values.device)
    bits = (values.to(torch.uint8).unsqueeze(-1) >> shifts) & 1
    return _join(bits.reshape(*values.shape[:-1], -1, 8))


def unpack_bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 `[..., bytes]` to uint8 `[..., bytes * 8 / width]`."""
    _check_width(width)
    if packed.shape[-1] * 8 % width:
        raise ValueError(f"{packed.shape[-1]} bytes do not hold whole fields of {width} bits")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return _join(bits.reshape(*packed.shape[:-1], -1, width))


def _join(bits: torch.Tensor) -> torch.Tensor:
    """Bits `[..., n]`, least significant first, to one uint8 each."""
    places = torch.tensor([1 << place for place in range(bits.shape[-1])], dtype=torch.uint8, device=bits.device)
    return (bits * places).sum(-1, dtype=torch.uint8)


def _check_width(width: int) -> None:
    if not 1 <= width <= 8:
        raise ValueError(f"fields have 1 to 8 bits, not {width}")

"""The weight formats; importing this package registers all of them.

`get_format(name)` finds one, `format_names()` lists them; docs/ has one page per family.
"""

from fewbit.formats import groupint, int4, iq3_s, scalar, trellis
from fewbit.formats.base import _FORMATS, Format, TensorSpec, get_format


def format_names() -> tuple[str, ...]:
    """The names of all registered formats, sorted."""
    return tuple(sorted(_FORMATS))


__all__ = ["Format", "TensorSpec", "format_names", "get_format", "groupint", "int4", "iq3_s", "scalar", "trellis"]

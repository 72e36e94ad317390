"""The weight formats; importing this package registers all of them.

`get_format(name)` finds one, `format_names()` lists them; docs/ has one page per family.
"""

from fewbit.formats import groupint, int4, iq3_s, scalar, svdquant, trellis, twinquant
from fewbit.formats.base import _FORMATS, Format, GroupFormat, TensorSpec, get_format, group_format


def format_names() -> tuple[str, ...]:
    """The names of all registered formats, sorted."""
    return tuple(sorted(_FORMATS))


def group_format_names() -> tuple[str, ...]:
    """Those that encode groups of columns."""
    return tuple(name for name in format_names() if isinstance(_FORMATS[name], GroupFormat))


__all__ = [
    "Format",
    "GroupFormat",
    "TensorSpec",
    "format_names",
    "get_format",
    "group_format",
    "group_format_names",
    "groupint",
    "int4",
    "iq3_s",
    "scalar",
    "svdquant",
    "trellis",
    "twinquant",
]

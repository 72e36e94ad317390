"""Model families: one short file each."""

from fewbit.models import llama, qwen
from fewbit.models.base import Family, SharedInput, families, get_family

__all__ = ["Family", "SharedInput", "families", "get_family", "llama", "qwen"]

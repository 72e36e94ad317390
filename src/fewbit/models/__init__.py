"""Model families: one short file each."""

from fewbit.models import gemma, llama, mixtral, qwen, qwen_moe
from fewbit.models.base import Experts, Family, Place, SharedInput, families, find_family, get_family

__all__ = [
    "Experts",
    "Family",
    "Place",
    "SharedInput",
    "families",
    "find_family",
    "gemma",
    "get_family",
    "llama",
    "mixtral",
    "qwen",
    "qwen_moe",
]

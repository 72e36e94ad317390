"""Model families: one short file each."""

from fewbit.models import gemma, llama, mixtral, qwen, qwen_moe
from fewbit.models.base import OUTPUT_ROTATION, Experts, Family, Place, SharedInput, families, find_family, get_family

__all__ = [
    "OUTPUT_ROTATION",
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

"""A tokenizer without transformers, which takes longer to import than a small model to load.

It reads `tokenizer.json` itself and does what transformers' class would do with it. What it is not sure to do in the
same way it leaves to transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fewbit.checkpoint.damage import damage_named, read_object, tried

if TYPE_CHECKING:
    from fewbit.runtime.chat_template import ChatTemplate

TOKENIZER_REMEDY = "copy tokenizer.json and its configuration from the model"

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_AS_STORED = ("TokenizersBackend", "PreTrainedTokenizerFast")
_QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN_MODELS = ("qwen2", "qwen3", "qwen3_moe")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATCHED = 100_000  # Mistral's vocabularies above this size get another expression from transformers


class Tokenizer:
    """The part of transformers' tokenizers that answering takes, with the same names."""

    def __init__(self, backend: Backend, named: dict[str, str], template: str | None) -> None:
        """`named` are the special tokens by the names that chat templates know them by."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._named = named
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a text under "input_ids"."""
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def get_vocab(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, and its id."""
        vocabulary: dict[str, int] = self._backend.get_vocab()
        return vocabulary

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of tokens. Nothing is cleaned up: that was for vocabularies of another kind."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        from fewbit.runtime.chat_template import ChatTemplate

        return ChatTemplate(self.chat_template or "")

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, for which `tokenize` has to be off; see `ChatTemplate.render`."""
        if tokenize or self.chat_template is None:
            raise ValueError("a template is rendered to text here, and there has to be one")
        return self._template.render(messages, self._named, add_generation_prompt)


def open_tokenizer(path: Path, model_type: str) -> Any:
    """The tokenizer of a directory, with the methods of `Tokenizer`; None where there is none.

    Raises `CorruptFile` for files that hold no tokenizer.
    """
    if not any(path.glob("tokenizer*")):
        return None
    with damage_named(path, TOKENIZER_REMEDY):
        found: Any = _open(path, model_type)
        if found is None:
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return tried(found)


def _open(path: Path, model_type: str) -> Tokenizer | None:
    """The tokenizer if this module covers it."""
    file, settings_file = path / "tokenizer.json", path / "tokenizer_config.json"
    if not (file.is_file() and settings_file.is_file()):
        return None
    settings = read_object(settings_file)
    name = settings.get("tokenizer_class")
    # To transformers every tokenizer of Qwen2 is of its own class, whatever the settings say.
    qwen = model_type in _QWEN_MODELS and (name in _QWEN_CLASSES or (name in _AS_STORED and model_type == "qwen2"))
    if not (qwen or name in _AS_STORED) or settings.get("auto_map") or settings.get("split_special_tokens"):
        return None
    named = _named_tokens(path, settings)
    template, sure = _chat_template(path, settings)
    if named is None or not sure:
        return None
    backend = Backend.from_file(str(file))
    if model_type.startswith("mistral") and backend.get_vocab_size() > _PATCHED:
        return None
    if not _agrees(backend, settings, named) or (qwen and not _as_qwen(backend, settings)):
        return None
    return Tokenizer(backend, named, template)


def _named_tokens(path: Path, settings: dict[str, Any]) -> dict[str, str] | None:
    """The special tokens that have names; None where old files say more than is understood here."""
    entries = {name: settings[name] for name in _NAMED if name in settings}
    if "added_tokens_decoder" not in settings:
        if (path / "added_tokens.json").exists():
            return None
        old = path / "special_tokens_map.json"
        if old.is_file():
            more = read_object(old)
            if set(more) - set(_NAMED):
                return None
            entries |= more
    return {name: _text(entry) for name, entry in entries.items() if entry is not None}


def _chat_template(path: Path, settings: dict[str, Any]) -> tuple[str | None, bool]:
    """The chat template if there is one, and whether that is sure: one among several is transformers' business."""
    if any(path.glob("chat_template*.json")) or (path / "additional_chat_templates").exists():
        return None, False
    file = path / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    return found, found is None or isinstance(found, str)


def _agrees(backend: Backend, settings: dict[str, Any], named: dict[str, str]) -> bool:
    """Whether the settings say nothing of tokens that `tokenizer.json` does not: transformers would add it."""
    added = backend.get_added_tokens_decoder()
    by_text = {token.content: token for token in added.values()}
    special = [*named.values(), *_more_tokens(settings)]
    for text in special:
        token = by_text.get(text)
        if token is None or not token.special or token.normalized:
            return False
    for index, entry in (settings.get("added_tokens_decoder") or {}).items():
        if int(index) not in added or repr(AddedToken(**entry)) != repr(added[int(index)]):
            return False
    return True


def _more_tokens(settings: dict[str, Any]) -> list[str]:
    """Texts of the special tokens that have no names, or names of the model's own."""
    entries: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        found = settings.get(name) or []
        entries += found.values() if isinstance(found, dict) else found
    entries += (value for name, value in settings.items() if name.endswith("_token") and name not in _NAMED)
    return [_text(entry) for entry in entries if isinstance(entry, str | dict)]


def _text(entry: str | dict[str, Any]) -> str:
    return str(entry["content"] if isinstance(entry, dict) else entry)


def _as_qwen(backend: Backend, settings: dict[str, Any]) -> bool:
    """Make of a tokenizer what transformers' class for Qwen makes of it, whatever the file says of words.

    False where the file holds another kind of vocabulary.
    """
    model = backend.model
    if type(model).__name__ != "BPE" or model.byte_fallback or model.fuse_unk or model.unk_token is not None:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout or model.ignore_merges:
        return False
    prefix = bool(settings.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return True

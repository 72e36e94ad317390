"""The tokenizer without transformers gives what transformers' own gives, or leaves it to that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from fewbit.assets import fetch_model
from fewbit.checkpoint.source import open_source
from fewbit.errors import FewbitError
from fewbit.runtime.tokenizer import Tokenizer, open_tokenizer

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two spaces\tand a tab\r\n\r\nand lines \n ",
    "It's 12345.678 of 90 %, isn't IT?",
    "caf\u00e9 cafe\u0301 \u212b \ufb01 \u00bd",  # composed, decomposed and compatibility characters
    "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600\U0001f468\u200d\U0001f467",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <tool_call>{}</tool_call><note> <s></s>",
    "def f(x):\n    return x**2  # \u221a\n" * 3,
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "<b>Wer?</b> \u00e4\n"}],
    [
        {"role": "user", "content": "One?", "name": None},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three <|im_end|>"},
    ],
)
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}{{ raise_exception('no such role') }}{% endif %}
    {%- set state = namespace(seen=false) %}
<|im_start|>{{ message['role'] }} {{ message | tojson }}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|im_end|>
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant {{ strftime_now('%Y') }}
{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_pairs() -> Backend:
    """A small byte-level vocabulary with special tokens and one more that was added."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<note>", lstrip=True)])
    return backend


@pytest.fixture
def stored(tmp_path):
    """A directory with a tokenizer that begins texts with a token."""
    backend = byte_pairs()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    ).save_pretrained(tmp_path)
    return tmp_path


def same(path: Path, model_type: str) -> Tokenizer:
    """The tokenizer of a directory, after comparing it with transformers'."""
    found, wanted = open_tokenizer(path, model_type), AutoTokenizer.from_pretrained(path)
    assert isinstance(found, Tokenizer)
    for text in TEXTS:
        for special in (True, False):
            ids = wanted(text, add_special_tokens=special)["input_ids"]
            assert found(text, add_special_tokens=special) == {"input_ids": ids}
            for skip in (True, False):
                options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
                assert found.decode(ids, **options) == wanted.decode(ids, **options)
                for token in ids:
                    assert found.decode([token], **options) == wanted.decode([token], **options)
    assert found.chat_template == wanted.chat_template
    for chat in CHATS if found.chat_template else ():
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            text = found.apply_chat_template(chat, **options)
            assert text == wanted.apply_chat_template(chat, **options)
            assert (
                found(text, add_special_tokens=False)["input_ids"]
                == wanted(text, add_special_tokens=False)["input_ids"]
            )
    return found


def change(path: Path, **settings) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_stored_tokenizer_is_transformers_own(stored):
    found = same(stored, "llama")
    assert found("a")["input_ids"][0] == 1
    assert found("a", add_special_tokens=False)["input_ids"][0] != 1


def test_padding_and_truncation_that_were_stored_are_off(stored):
    backend = Backend.from_file(str(stored / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=20)
    backend.save(str(stored / "tokenizer.json"))
    change(stored, pad_token="<|im_end|>")
    same(stored, "llama")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend"])
def test_qwens_words_are_those_of_transformers_whatever_the_file_says(tmp_path, name, model_type):
    model = json.loads(byte_pairs().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(model["vocab"], merges, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.0.0"}))
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"], content["pre_tokenizer"] = None, {"type": "Whitespace"}
    file.write_text(json.dumps(content), encoding="utf-8")
    change(tmp_path, tokenizer_class=name)
    same(tmp_path, model_type)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"split_special_tokens": True},
        {"extra_special_tokens": ["<new>"]},
        {"pad_token": "<new>"},
        {"image_token": "<note>"},
        {"added_tokens_decoder": {"1": {"content": "<|im_start|>", "lstrip": True, "special": True}}},
    ],
)
def test_what_is_not_covered_is_left_to_transformers(stored, settings):
    change(stored, **settings)
    assert not isinstance(open_tokenizer(stored, "llama"), Tokenizer)


def test_without_files_there_is_none(tmp_path):
    assert open_tokenizer(tmp_path, "llama") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"broken'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[1, 2]"),
        ("tokenizer_config.json", '{"broken'),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": {"x": 1}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend", "bos_token": {"text": "no content"}}'),
    ],
)
def test_damaged_files_are_named_with_the_remedy(stored, name, text):
    (stored / name).write_text(text)
    with pytest.raises(FewbitError, match=r"token(izer|s)") as caught:
        open_tokenizer(stored, "llama")
    assert str(stored) in str(caught.value)
    assert re.search("copy tokenizer.json|make the checkpoint again", str(caught.value))


def test_a_template_raises_what_it_says_and_keeps_to_the_sandbox(stored):
    found = open_tokenizer(stored, "llama")
    with pytest.raises(Exception, match="no such role"):
        found.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="one message"):
        found.apply_chat_template([])
    for template in ("{{ ''.__class__.__mro__ }}", "{% set n = namespace(__x=1) %}", "{{ messages.append(1) }}"):
        (stored / "chat_template.jinja").write_text(template)
        tokenizer = open_tokenizer(stored, "llama")
        with pytest.raises(SecurityError):
            tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_type"), [("smollm2-135m", "llama"), ("qwen2.5-coder-1.5b", "qwen2")])
def test_real_tokenizers_are_transformers_own(name, model_type, tmp_path, wiki_eval):
    try:
        source = open_source(fetch_model(name))
    except FewbitError as error:
        pytest.skip(str(error))
    source.copy_tokenizer(tmp_path)
    source.config.save_pretrained(tmp_path)
    found = same(tmp_path, model_type)
    assert found.chat_template
    text = wiki_eval[:20_000]
    assert found(text)["input_ids"] == source.tokenizer()(text)["input_ids"]

"""A toy model that is there at once: `python benchmarks/toy.py DIRECTORY`, or `toy_model(directory)`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def toy_model(directory: Path) -> Path:
    """A random two-layer LLaMA with 512 positions, a token per printable ASCII character, and a chat template.

    It is just wide enough for twinquant's branches.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 5}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {"<unk>": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE)
    fast.save_pretrained(directory)
    return directory


def toy_checkpoint(directory: Path) -> Path:
    """The toy model in 3 bits, made in a directory; served and run without torch."""
    import fewbit

    text = directory / "text.txt"
    text.write_text("Once upon a time there was a town by the sea. " * 100, encoding="utf-8")
    options = fewbit.QuantizeOptions(calib_tokens=1024, calib_window=64)
    fewbit.quantize(toy_model(directory / "model"), directory / "toy", options, [text])
    return directory / "toy"


if __name__ == "__main__":
    toy_model(Path(sys.argv[1]))

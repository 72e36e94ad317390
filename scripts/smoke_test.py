"""Uses an installed fewbit as a user would: the command's help, a toy model compressed, checked and asked.

Run by `build_wheel.sh` in an environment that has the wheel and what it depends on, nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fewbit
from fewbit.ops.extension import load_native


def toy_model(directory: Path) -> None:
    """A random two-layer LLaMA with a token per printable ASCII character."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, eos_token_id=2, **sizes)).save_pretrained(directory)
    vocabulary = {"<unk>": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)


def main() -> None:
    if load_native() is None:
        raise SystemExit("the wheel has no native extension")
    command = str(Path(sys.executable).parent / "fewbit")
    with tempfile.TemporaryDirectory() as directory:
        model, out, text = (str(Path(directory) / name) for name in ("model", "out", "text.txt"))
        toy_model(Path(model))
        Path(text).write_text("Once upon a time there was a town by the sea. " * 200, encoding="utf-8")
        for arguments in (
            ["--help"],
            ["quantize", model, out, "--calib", text, "--calib-tokens", "1024", "--calib-window", "64"],
            ["verify", out],
            ["generate", out, "-p", "Once upon", "--max-tokens", "8"],
        ):
            run = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
            if run.returncode != 0 or not run.stdout.strip():
                raise SystemExit(f"fewbit {' '.join(arguments)} failed:\n{run.stdout}{run.stderr}")
    print(f"fewbit {fewbit.__version__} works as installed in {sys.prefix}")


if __name__ == "__main__":
    main()

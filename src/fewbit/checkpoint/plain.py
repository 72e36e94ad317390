"""Full-precision models as transformers modules and as Hugging Face directories.

The way back from a `Source`: build the module, or write a plain safetensors directory that any host reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.equivalent import rotate_output
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import SHARD_LIMIT, ShardedWriter
from fewbit.errors import CorruptFile, UsageError
from fewbit.experts import fuse_names
from fewbit.models import OUTPUT_ROTATION, Family, find_family

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_plain(source: Source, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a source as a transformers module in evaluation mode, with parameters in `dtype`.

    Raises `CorruptFile` when the source lacks a tensor, which transformers would fill with random numbers.
    """
    check_fits(source)
    family = find_family(source.config.model_type)
    weights = {name: source.tensor(name).to(dtype) for name in source.names()}
    weights = fuse_names(weights, family)
    rotation = weights.pop(f"{family.final_norm}.{OUTPUT_ROTATION}", None) if family else None
    # The automatic class insists on a path; the model's own class does not need one.
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    model, loading = model_class.from_pretrained(
        None, config=copy.deepcopy(source.config), state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise CorruptFile(f"{source.path}: has no tensor {min(loading['missing_keys'])}; download the model again")
    if family is not None and rotation is not None:
        norm = model.get_submodule(family.final_norm)
        rotate_output(norm)
        norm.rotation.data = rotation
    return model.eval()


def check_fits(source: Source) -> None:
    """Refuse a source that is not the whole of the model that its configuration describes.

    Raises `UsageError` for a model without an output head, `CorruptFile` for one much larger than the source and, in a
    known family, for a parameter that the source lacks or has in another shape: transformers would fill it with random
    numbers.
    """
    config, family = source.config, find_family(source.config.model_type)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{source.path}: '{config.model_type}' is no causal language model; give one that is")
    with damage_named(source.path, "download the model again"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _check_size(source, model)
    # Of other families transformers knows older names too.
    if family is not None:
        _check_shapes(source, model, family)


def _check_size(source: Source, model: Any) -> None:
    described, held = sum(parameter.numel() for parameter in model.parameters()), source.weights()
    if described > 2 * held:
        raise CorruptFile(
            f"{source.path}: the configuration describes {described} weights, the files hold {held}; copy config.json "
            "from the model, or download the model again"
        )


def _check_shapes(source: Source, model: Any, family: Family) -> None:
    """Compare the source with a model on the meta device."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    known = set(source.names())
    for name, shape in _parameters(model, family):
        if name in tied and name not in known:
            continue
        if name not in known and name == f"{family.head}.weight":
            raise UsageError(
                f"{source.path}: has no output head ({name}), so it generates no text; give the whole language model"
            )
        if name not in known:
            raise CorruptFile(f"{source.path}: has no tensor {name}; download the model again")
        if source.shape(name) != shape:
            raise CorruptFile(
                f"{source.path}: {name} is {list(source.shape(name))}, the configuration says {list(shape)}; download "
                "the model again"
            )


def _parameters(model: Any, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's parameters, those of fused experts one by one: modules for them take seconds."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parent, _, leaf = name.rpartition(".")
        if len(shape) != 3 or family.experts is None or not parent.endswith(f".{family.experts.module}"):
            yield name, shape
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert in range(shape[0]):
            for part in parts:
                yield f"{parent}.{expert}.{part}.weight", (shape[1] // len(parts), shape[2])


def write_plain(
    out_dir: str | Path,
    config: PretrainedConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_LIMIT,
) -> None:
    """Write a Hugging Face directory: `config.json` and safetensors in `dtype`, in shards of about `shard_bytes`.

    `tensors` are (state dict name, tensor) pairs, taken one by one; memory holds one shard. Raises
    `UsageError` when the directory holds weights already.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.safetensors")):
        raise UsageError(f"{out}: holds weights already; remove them or name another directory")
    writer = ShardedWriter(out, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor.detach().to(dtype).contiguous())
    writer.close()
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.dtype = dtype
    plain.save_pretrained(out)

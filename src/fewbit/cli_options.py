"""The options of `fewbit quantize` and of the verbs that run a model, one type each, so that verbs read as lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLACE, CALIBRATION, TUNING, TWIN, TASKS = "Where and how", "Calibration", "Tuning", "TwinQuant", "Tasks"
SAMPLING, ENGINE = "Sampling", "Engine"

Model = Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or a .gguf file.")]
Out = Annotated[Path, typer.Argument(help="The directory to write; it appears when everything is complete.")]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="itq3_s (weights of 2 to 4 bits) or twinquant (4-bit weights, inputs of 4, 8 or 16 bits)."
    ),
]
Code = Annotated[
    str,
    typer.Option(
        help="Of itq3_s: trellis (the default), or ternary, iq3_s, lloyd8 (controls). Of twinquant: twin, or svdquant "
        "(a control)."
    ),
]
Rank = Annotated[int, typer.Option(help="Rank of the low-rank branch; narrow matrices get less.", rich_help_panel=TWIN)]
ActBits = Annotated[int, typer.Option(help="Bits of the inputs: 4, 8 or 16.", rich_help_panel=TWIN)]
BranchInit = Annotated[
    str,
    typer.Option(
        help="Where the branch begins: svd (most of the weight's own energy) or whitened (most of the outputs').",
        rich_help_panel=TWIN,
    ),
]
Smooth = Annotated[
    bool,
    typer.Option(help="Fold in the scales that make inputs cheapest to quantize.", rich_help_panel=TWIN),
]
Center = Annotated[bool, typer.Option(help="Take the mean off inputs before they are quantized.", rich_help_panel=TWIN)]
Learn = Annotated[
    bool | None,
    typer.Option(
        help="Learn the axes before rounding. Default: for models of up to 2 billion weights.", rich_help_panel=TWIN
    ),
]
LearnSteps = Annotated[
    int, typer.Option(help="Steps of learning at most; 0: fewer for larger models.", rich_help_panel=TWIN)
]
Ablation = Annotated[
    str,
    typer.Option(
        help="naive (rounding alone), low-rank (with a branch), hadamard (rotated too), full (everything).",
        rich_help_panel=TWIN,
    ),
]
Bits = Annotated[
    float,
    typer.Option(
        help="Bits per weight: 2, 3 or 4 for the trellis, or a mean such as 3.25, for which each tensor's bits are "
        "chosen by measured sensitivity. 0: 3, or 4 for twinquant."
    ),
]
TargetSize = Annotated[
    str, typer.Option(help="Choose each tensor's bits so that all of them take this, such as 800MB or 1.2GB.")
]
Head = Annotated[
    str, typer.Option(help="Output head and embeddings: itq2, itq3, itq4, int8, bf16 or auto (itq4, or chosen).")
]
Rotate = Annotated[bool, typer.Option(help="Rotate weights before they are rounded; without it, a control.")]
Rounding = Annotated[str, typer.Option(help="ldlq (error feedback from calibration text) or nearest.")]
Calib = Annotated[
    list[str] | None,
    typer.Option(
        "--calib",
        help="Calibration text, repeatable, FILE or FILE:WEIGHT; UTF-8, or .jsonl with text or messages (chats go "
        "through the model's template). Default: web and Wikipedia text, fetched.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibTokens = Annotated[int, typer.Option(help="Token budget over all calibration files.", rich_help_panel=CALIBRATION)]
CalibWindow = Annotated[int, typer.Option(help="Tokens per calibration window.", rich_help_panel=CALIBRATION)]
CalibDtype = Annotated[
    str,
    typer.Option(help="Matrix products of calibration: auto, bfloat16 or float32.", rich_help_panel=CALIBRATION),
]
Sequential = Annotated[
    bool,
    typer.Option(
        help="Calibrate each layer behind those that are rounded already, or in the full model.",
        rich_help_panel=CALIBRATION,
    ),
]
Damping = Annotated[
    str,
    typer.Option(help="Hessian damping relative to its mean diagonal, or auto.", rich_help_panel=CALIBRATION),
]
Tune = Annotated[
    bool | None,
    typer.Option(
        help="Tune scales, norms and biases after rounding. Default: for models of up to 2 billion weights.",
        rich_help_panel=TUNING,
    ),
]
TuneSteps = Annotated[
    int, typer.Option(help="Steps of tuning at most; 0: fewer for larger models.", rich_help_panel=TUNING)
]
Executor = Annotated[
    str,
    typer.Option(
        help="Where tensors are rounded: auto, serial (this process), process (a pool of them) or ray.",
        rich_help_panel=PLACE,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Workers of that executor. Default: one per processor, with auto as memory allows.", rich_help_panel=PLACE
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="The Ray cluster to work on, such as HOST:6379 or auto. Default: RAY_ADDRESS, or one started here.",
        rich_help_panel=PLACE,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(help="Where the unfinished run lies. Default: hidden, beside OUT.", rich_help_panel=PLACE),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start again, and replace an existing output.", rich_help_panel=PLACE)
]

AnyModel = Annotated[str, typer.Argument(metavar="PATH", help="A fewbit checkpoint, or any model quantize takes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: all.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that hold this probability.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(help="Leave out tokens less likely than this times the likeliest.", rich_help_panel=SAMPLING),
]
Penalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", help="Above 1: tokens seen before become less likely.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the sampling. Default: another each time.", rich_help_panel=SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End where this text comes; repeatable.", rich_help_panel=SAMPLING)
]
Threads = Annotated[int | None, typer.Option(help="Threads. Default: one per core.", rich_help_panel=ENGINE)]
Kv = Annotated[str, typer.Option(help="The cache of keys and values: bf16 or int8.", rich_help_panel=ENGINE)]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer. Default: the model's own, 4096 at most.", rich_help_panel=ENGINE),
]
Draft = Annotated[
    int,
    typer.Option(
        help="Guess up to so many tokens from the text so far and check them together; changes the speed, not the "
        "answer. 0: none.",
        rich_help_panel=ENGINE,
    ),
]
ExportDtype = Annotated[str, typer.Option("--dtype", help="Of the weights: bfloat16, float16 or float32.")]
ShardSize = Annotated[str, typer.Option(help="A weight file takes no more than this, such as 2GB.")]

Tasks = Annotated[
    str,
    typer.Option(
        help="Tasks of lm-evaluation-harness with commas between them, such as hellaswag,arc_easy; instead of a text.",
        rich_help_panel=TASKS,
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(help="Questions per task, or below 1 the share of them. Default: all.", rich_help_panel=TASKS),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(help="A directory of further tasks, a YAML file each.", rich_help_panel=TASKS),
]

"""What compression cost: perplexity, divergence from a reference, and models for honest comparisons."""

from fewbit.evaluate.offgrid import off_grid, write_off_grid
from fewbit.evaluate.perplexity import EvalResult, evaluate, evaluate_many
from fewbit.evaluate.windows import windows

__all__ = ["EvalResult", "evaluate", "evaluate_many", "off_grid", "windows", "write_off_grid"]

"""Run a checkpoint inside vLLM: python vllm_offline.py OUT "The capital of France is" "Two and two are"

fewbit and vLLM share one environment; there is nothing to import from fewbit and no option to give.
"""

import argparse

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts its workers from this file
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=16)
    arguments = parser.parse_args()
    llm = LLM(arguments.checkpoint, max_model_len=512)
    settings = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    for answer in llm.generate(arguments.prompts, settings):
        print(answer.prompt + answer.outputs[0].text)

"""One vLLM engine in a process of its own: argv[1] is JSON with `engine` (arguments of LLM), `prompts` (token ids) and
`tokens` (how many to add); the last line printed is JSON, for every prompt the tokens and their log probabilities."""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.argv[1])
    engine = LLM(**asked["engine"])
    greedy = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = [output.outputs[0] for output in engine.generate(prompts, greedy, use_tqdm=False)]
    found = [
        {
            "tokens": list(answer.token_ids),
            "logprobs": [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)],
        }
        for answer in answers
    ]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":  # vLLM starts its workers from this file
    main()

"""Several prompts at once, on what an earlier one left in the cache: python examples/many_prompts.py [model]"""

import sys

from qwen3_next import LLM, EngineConfig, SamplingParams


def main() -> None:
    """Continue one beginning in three ways."""
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, config=EngineConfig(max_sequences=4))
    beginning = "Once upon a time, in a small village by the sea, there lived an old man who had three sons. " * 4
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=16, seed=1)
    (first,) = llm.generate(beginning, params)[0]
    print(first.text)
    for (answer,) in llm.generate([beginning + "The eldest", beginning + "The youngest"], params, progress=False):
        print(f"{answer.cached_tokens} of {answer.prompt_tokens} tokens cached: {answer.text}")


if __name__ == "__main__":
    main()

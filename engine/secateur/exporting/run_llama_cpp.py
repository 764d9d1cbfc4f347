"""A process that runs llama.cpp on a GGUF file: it takes prompts, and writes the likeliest next tokens of each.

It runs alone, because llama.cpp ends its process where a file is wrong. It needs xllamacpp and nothing of secateur.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LIKELIEST, CONTEXT = 20, 512


def main(model: str, asked: str, answered: str) -> None:
    """Answer prompts.

    Args:
        model: The GGUF file.
        asked: A JSON file with "prompts", each a text or a list of token numbers, "next", a token of letters, and
            "threads".
        answered: The JSON file that is written: for each prompt the number of its tokens and the likeliest next tokens, as
            pairs of token number and log-probability.
    """
    import xllamacpp

    content = json.loads(Path(asked).read_text(encoding="utf-8"))
    # llama.cpp holds back the log-probabilities where the next token is part of a character, or ends the text. They are those
    # before the bias.
    options = {"max_tokens": 1, "temperature": 0.0, "logprobs": LIKELIEST, "logit_bias": [[content["next"], 1000.0]]}
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = CONTEXT, 1, False
    # By default, llama.cpp takes all cores, and its threads wait busily for each other.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = content["threads"]
    # Attention in float32. By default, llama.cpp computes it in half precision.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_gpu_layers = 0
    server = xllamacpp.Server(parameters)
    answers = []
    for prompt in content["prompts"]:
        answer = server.handle_completions({"prompt": prompt, **options})
        (first,) = answer["choices"][0]["logprobs"]["content"]
        likeliest = [(entry["id"], entry["logprob"]) for entry in first["top_logprobs"]]
        answers.append({"tokens": answer["usage"]["prompt_tokens"], "likeliest": likeliest})
    Path(answered).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

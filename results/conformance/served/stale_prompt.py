"""Five requests after which llama.cpp's server gives a wrong answer about a model with windows.

    python results/conformance/served/stale_prompt.py http://127.0.0.1:8080     # a server just started on olmo2.gguf

A prompt is asked with the prefix cache and without. The two log-probabilities of its next token must be alike.
"""

import json
import random
import sys
import urllib.request


def log_probability(prompt: list[int], use_cache: bool) -> float:
    """Of the likeliest next token, in nats. `cache_prompt` is llama.cpp's own setting of a request."""
    body = {"model": "olmo2", "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 1}
    data = json.dumps(body | {"cache_prompt": use_cache}).encode()
    request = urllib.request.Request(f"{sys.argv[1]}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return float(json.load(reply)["choices"][0]["logprobs"]["content"][0]["logprob"])


random.seed(0)
prompt = random.choices(range(1000, 2000), k=120)
same_61 = prompt[:61] + random.choices(range(1000, 2000), k=59)
same_58 = prompt[:58] + random.choices(range(1000, 2000), k=62)
for before in (prompt, same_61, prompt, same_58):
    log_probability(before, use_cache=True)
print("with the cache:", log_probability(prompt[:60], use_cache=True))
print("without it:    ", log_probability(prompt[:60], use_cache=False))

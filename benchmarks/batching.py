"""Published effects of batching policies: `python -m benchmarks.batching [EFFECT ...]`.

    orca      highest rate at twice the unloaded median normalised latency, static batching against Orca
              (OSDI'22, section 6.2, figure 10: GPT-3 175B, 36.9 times FasterTransformer)
    paged     highest rate at twice the unloaded mean normalised latency, Orca with reserved memory against vLLM V0
              (SOSP'23, section 6.2, figure 12a: OPT-13B on an A100 40GB, ShareGPT)
    stalls    P99 time between tokens at one rate, and the highest rate at a P99 of 100 ms, vLLM V0 against Sarathi
              (OSDI'24, section 5.1: Mistral-7B on an A100 80GB, openchat_sharegpt4: 2.6 times)

Normalised latency: end-to-end latency / output tokens. Lengths are drawn from what the papers say of them. Models that
llmsim does not know by name are written as a config.json of the same size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from math import exp, log
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

REQUESTS = 1500
PRECISION = 1.05  # rates are found to this factor
SHAPES = {  # MLPs of two matrices as gated ones of the same number of weights
    "gpt3-175b": {"hidden_size": 12288, "intermediate_size": 32768, "num_hidden_layers": 96, "heads": 96},
    "opt-13b": {"hidden_size": 5120, "intermediate_size": 13653, "num_hidden_layers": 40, "heads": 40},
}


def config(folder: Path, name: str) -> str:
    """The path of a config.json with the shape of `name`."""
    shape = dict(SHAPES[name])
    heads = shape.pop("heads")
    document = shape | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    path = folder / name / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return str(path)


# ---- workloads -----------------------------------------------------------------------------------------------------


def _arrivals(random: np.random.Generator, rate: float, requests: int) -> Any:
    at_s = np.cumsum(random.exponential(1.0 / rate, requests))
    return at_s - at_s[0]


def orca_trace(rate: float, requests: int = REQUESTS) -> Trace:
    """Orca, section 6.2: prompts of 32 to 512 tokens, answers of 1 to 128, both uniform; Poisson."""
    random = np.random.default_rng(0)
    at_s = _arrivals(random, rate, requests)
    return Trace("orca", at_s, random.integers(32, 513, requests), random.integers(1, 129, requests))


def sharegpt_trace(rate: float, requests: int = REQUESTS) -> Trace:
    """SOSP'23, figure 11: prompts of 161 and answers of 338 tokens in the mean, log-normal here to 1024; Poisson."""
    random = np.random.default_rng(0)
    at_s = _arrivals(random, rate, requests)
    lengths = [
        np.clip(random.lognormal(log(mean) - sigma**2 / 2, sigma, requests).astype(np.int64), 4, 1024)
        for mean, sigma in ((161.3, 1.1), (338.0, 0.9))
    ]
    return Trace("sharegpt", at_s, *lengths)


def openchat_trace(rate: float, requests: int = REQUESTS) -> Trace:
    """Sarathi-Serve, table 2: medians 1730 and 415 tokens, P90 5696 and 834, log-normal here; none above 8192."""
    random = np.random.default_rng(0)
    at_s = _arrivals(random, rate, requests)
    prompt, output = (
        np.maximum(random.lognormal(log(median), log(p90 / median) / 1.2816, requests).astype(np.int64), 4)
        for median, p90 in ((1730, 5696), (415, 834))
    )
    kept = prompt + output <= 8192
    return Trace("openchat", at_s[kept] - at_s[kept][0], prompt[kept], output[kept])


# ---- measures ------------------------------------------------------------------------------------------------------


def normalised_s(result: Result) -> Any:
    requests = result.requests
    return (requests["finish_s"] - requests["arrival_s"]) / requests["output_tokens"]


def p99_tbt_s(result: Result) -> float:
    return float(result.summary()["p99_itl_ms"]) / 1e3


def highest_rate(passes: Callable[[float], bool], low: float, high: float) -> float:
    """The rate at which `passes` turns false, between two at which it is true and false."""
    if not passes(low):
        raise ValueError(f"{low} requests/s are too many already: begin lower")
    while high / low > PRECISION:
        middle = exp((log(low) + log(high)) / 2)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def rate_at_twice(scenario: Scenario, trace_of: Callable[[float], Trace], typical: Callable[[Any], float]) -> float:
    """Highest rate whose typical normalised latency is at most twice that without load."""
    limit_s = 2.0 * typical(normalised_s(simulate(trace_of(1e-3), scenario)))
    return highest_rate(lambda rate: typical(normalised_s(simulate(trace_of(rate), scenario))) <= limit_s, 0.02, 40.0)


# ---- effects -------------------------------------------------------------------------------------------------------


def orca(folder: Path, requests: int = REQUESTS) -> dict[str, float]:
    """Rates by policy; static batching without waiting to fill, which is its best here."""
    settings: dict[str, Any] = {
        "model": config(folder, "gpt3-175b"), "gpu": "a100-80gb-sxm", "tensor_parallel": 8, "async_scheduling": False,
        "max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 4096,
    }  # fmt: skip
    policies: dict[str, dict[str, Any]] = {
        "static": {"scheduler": "static", "scheduler_args": {"batch_size": 16, "timeout_s": 0.0}},
        "dynamic": {"scheduler": "dynamic", "scheduler_args": {"batch_size": 16, "timeout_s": 0.0}},
        "orca": {"scheduler": "orca", "scheduler_args": {"batch_size": 32}},
    }
    trace_of = partial(orca_trace, requests=requests)
    return {
        name: rate_at_twice(Scenario(**settings, **policy), trace_of, lambda values: float(np.median(values)))
        for name, policy in policies.items()
    }


def paged(folder: Path, requests: int = REQUESTS) -> dict[str, float]:
    settings: dict[str, Any] = {
        "model": config(folder, "opt-13b"), "gpu": "a100-40gb-sxm", "async_scheduling": False, "max_model_len": 2048,
        "max_num_seqs": 256, "max_num_batched_tokens": 4096, "enable_prefix_caching": False,
    }  # fmt: skip
    policies: dict[str, dict[str, Any]] = {
        "orca max": {"scheduler": "orca", "scheduler_args": {"reserve": "max", "max_tokens": 2048}},
        "orca pow2": {"scheduler": "orca", "scheduler_args": {"reserve": "pow2", "buddy": True}},
        "orca oracle": {"scheduler": "orca", "scheduler_args": {"reserve": "oracle", "buddy": True}},
        "vllm-v0": {"scheduler": "vllm-v0"},
    }
    trace_of = partial(sharegpt_trace, requests=requests)
    return {
        name: rate_at_twice(Scenario(**settings, **policy), trace_of, lambda values: float(np.mean(values)))
        for name, policy in policies.items()
    }


def stalls(requests: int = REQUESTS, limit_s: float = 0.1) -> dict[str, tuple[float, float]]:
    """By policy: P99 time between tokens at 2 requests/s (s), and the highest rate at which it is within the limit.

    As in the paper, a rate counts only if the median request is scheduled within two seconds.
    """
    settings: dict[str, Any] = {
        "model": "mistral-7b", "gpu": "a100-80gb-sxm", "async_scheduling": False, "max_model_len": 8192,
        "max_num_seqs": 128, "max_num_batched_tokens": 8192, "enable_prefix_caching": False,
    }  # fmt: skip
    policies: dict[str, dict[str, Any]] = {
        "orca": {"scheduler": "orca"},
        "vllm-v0": {"scheduler": "vllm-v0"},
        "sarathi": {"scheduler": "sarathi", "scheduler_args": {"token_budget": 512}},
    }
    found = {}
    for name, policy in policies.items():
        scenario = Scenario(**settings, **policy)

        def within(rate: float, scenario: Scenario = scenario) -> bool:
            result = simulate(openchat_trace(rate, requests), scenario)
            waited_s = np.median(result.requests["scheduled_s"] - result.requests["arrival_s"])
            return p99_tbt_s(result) <= limit_s and bool(waited_s <= 2.0)

        at_two = p99_tbt_s(simulate(openchat_trace(2.0, requests), scenario))
        found[name] = at_two, highest_rate(within, 0.2, 10.0)
    return found


def _print_rates(title: str, rates: dict[str, float]) -> None:
    best = list(rates)[-1]
    print(title)
    for name, rate in rates.items():
        print(f"  {name:<12}{rate:>8.2f} requests/s{rates[best] / rate:>8.1f} x to {best}")


@click.command()
@click.argument("effects", nargs=-1, type=click.Choice(["orca", "paged", "stalls"]))
def main(effects: tuple[str, ...]) -> None:
    """Print each effect; all without arguments."""
    wanted = effects or ("orca", "paged", "stalls")
    with TemporaryDirectory() as folder:
        if "orca" in wanted:
            _print_rates("GPT-3 175B, 8 A100 80GB: rate at twice the unloaded median latency", orca(Path(folder)))
        if "paged" in wanted:
            _print_rates("OPT-13B, A100 40GB: rate at twice the unloaded mean latency", paged(Path(folder)))
        if "stalls" in wanted:
            print("Mistral-7B, A100 80GB: P99 time between tokens at 2 requests/s; rate at a P99 of 100 ms")
            for name, (p99_s, rate) in stalls().items():
                print(f"  {name:<12}{1e3 * p99_s:>8.0f} ms{rate:>12.2f} requests/s")


if __name__ == "__main__":
    main()

"""CUDA graph sizes, modes and padding are those of vLLM."""

import json
from pathlib import Path

import pytest

from llmsim.cost import EAGER, FULL, PIECEWISE
from llmsim.cost.graphs import Graphs, capture_sizes

RECORDINGS = Path(__file__).parent / "data" / "recordings"


def server(max_num_seqs=256, max_num_batched_tokens=8192, cudagraph="full_and_piecewise"):
    return Graphs.of_engine(max_num_seqs, max_num_batched_tokens, cudagraph)


def test_capture_sizes_are_those_of_the_recorded_engines():
    engines = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDINGS.rglob("engine.json"))]
    assert engines, f"no engine.json under {RECORDINGS}"
    for engine in engines:
        sizes = capture_sizes(engine["max_num_seqs"], engine["max_num_batched_tokens"])
        assert list(sizes) == engine["cudagraph_capture_sizes"]


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "last"),
    [
        (1024, 8192, [480, 496, 512]),  # never above 512
        (100, 8192, [184, 192, 200]),  # twice the requests
        (3, 8192, [1, 2, 4]),  # 6 is not on the grid
        (256, 100, [88, 96, 100]),  # the token budget is captured too
    ],
)
def test_the_largest_size_is_bounded_by_requests_tokens_and_512(max_num_seqs, max_num_batched_tokens, last):
    assert list(capture_sizes(max_num_seqs, max_num_batched_tokens))[-3:] == last


def test_decodes_run_as_one_graph_as_long_as_their_padded_count_is_at_most_max_num_seqs():
    assert server().mode(256, 0) == FULL
    assert server().mode(257, 0) == PIECEWISE
    # 99 and 100 requests pad to 104, for which there is no full graph
    assert [server(max_num_seqs=100).mode(n, 0) for n in (96, 97, 100)] == [FULL, PIECEWISE, PIECEWISE]


def test_prefills_run_piecewise_up_to_the_largest_size_and_eagerly_above():
    assert [server().mode(tokens, 1) for tokens in (2, 512, 513, 8192)] == [PIECEWISE, PIECEWISE, EAGER, EAGER]


def test_cudagraph_settings_take_modes_away():
    assert server(cudagraph="piecewise").mode(8, 0) == PIECEWISE
    assert server(cudagraph="none").mode(1, 0) == EAGER
    assert server(cudagraph="none").padded(3) == 3


def test_graphs_pad_to_the_next_size_and_eager_iterations_do_not():
    assert [server().padded(n) for n in (1, 3, 5, 9, 250, 257, 512, 513)] == [1, 4, 8, 16, 256, 272, 512, 513]


def test_padding_agrees_with_its_definition_for_every_count():
    graphs = server(max_num_seqs=200)
    for tokens in range(1, graphs.largest + 1):
        assert graphs.padded(tokens) == min(size for size in graphs.sizes if size >= tokens)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"cudagraph='full' is not a mode. Use one of full_and_piecewise"):
        server(cudagraph="full")
    with pytest.raises(ValueError, match="rising order"):
        Graphs([1, 4, 2], max_num_seqs=4)

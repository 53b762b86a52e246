"""Speculative decoding: rules checked by hand, acceptance against the formula, KV conserved, and where it stops
paying.
"""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llmsim.batch_speculative import SpeculatingBatch
from llmsim.cli import main
from llmsim.cost import EAGER, FULL, PIECEWISE
from llmsim.cost.roofline import flops
from llmsim.drafting import speculation_of
from llmsim.hardware import find_model
from llmsim.metrics import latencies_s
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.schedulers import BUILTIN
from llmsim.simulate import Fleet, blocks_of, cost_of, simulate
from llmsim.speculation import table
from llmsim.trace import Trace

BASE = Scenario(model="llama-3.1-8b", gpu="h200-sxm", launch_jitter=False)
EAGLE = {"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "acceptance": 0.5}


def speculating(acceptance, drafts=2, method="ngram", **more):
    return {"method": method, "num_speculative_tokens": drafts, "acceptance": acceptance, **more}


def trace_of(prompts, outputs, arrival_s=None, **columns):
    n = len(prompts)
    at_s = np.zeros(n) if arrival_s is None else np.array(arrival_s, float)
    return Trace("by hand", at_s, np.array(prompts), np.array(outputs), **columns)


def batch_of(config, total_blocks=10_000, block_tokens=16, seed=0):
    return SpeculatingBatch(block_tokens, speculation_of(config), seed, total_blocks)


def decoding(i, prompt=100, output=50):
    """A request whose prompt is computed and whose first token is made."""
    request = Request(i, 0.0, prompt, output)
    request.computed_tokens, request.generated_tokens = prompt, 1
    return request


# ---- tokens of a verification -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "drafts", "made"),
    [
        (1.0, 2, [3, 3, 3]),  # 9 tokens after the first: all accepted, two drafts and its own
        ([1.0, 0.0], 2, [2, 2, 2, 2, 1]),  # the second draft never; the last token ends it
        (0.0, 2, [1] * 9),
        (1.0, 8, [9]),
        (1.0, 5, [6, 3]),  # what is accepted beyond its end is thrown away
    ],
)
def test_a_verification_makes_its_accepted_drafts_and_one_token(acceptance, drafts, made):
    result = simulate(trace_of([32], [10]), replace(BASE, speculative_config=speculating(acceptance, drafts)))
    rows = result.iterations
    assert rows["decoded_tokens"].tolist() == [0, *made]
    assert rows["drafts"].tolist() == [0, *[drafts] * len(made)]  # a prompt has none


@pytest.mark.parametrize(("a", "k"), [(0.5, 1), (0.5, 4), (0.7, 3), (0.8, 5), (0.9, 8)])
def test_mean_tokens_of_a_verification_are_those_of_leviathan(a, k):
    """(1 - a^(k+1)) / (1 - a). 20,000 verifications, whose mean has a standard error below 0.02: within 1.5 %."""
    batch = batch_of(speculating(a, k))
    requests = [decoding(i, output=1000) for i in range(20)]
    drawn = np.concatenate([batch._draw(request) for request in requests]) + 1
    expected = (1 - a ** (k + 1)) / (1 - a)
    assert speculation_of(speculating(a, k)).tokens_per_step == pytest.approx(expected, rel=1e-12)
    assert drawn.mean() == pytest.approx(expected, rel=0.015)


def test_a_replay_makes_as_many_tokens_as_the_formula_says():
    """Beside the draws this has the ends of answers, which cut the last verification short: 1 token of 300."""
    result = simulate(trace_of([64] * 100, [300] * 100), replace(BASE, speculative_config=EAGLE))
    rows = result.iterations
    assert rows["decoded_tokens"].sum() / rows["seqs"].sum() == pytest.approx((1 - 0.7**4) / 0.3, rel=0.015)


def test_positions_have_chances_of_their_own():
    own = speculation_of(speculating([0.8, 0.5, 0.25], 3))
    assert own.survival == pytest.approx((0.8, 0.4, 0.1))
    assert own.tokens_per_step == pytest.approx(2.3)


def test_without_a_proposal_there_is_nothing_to_verify():
    config = speculating(1.0, 3, proposal_rate=0.25)
    rows = simulate(trace_of([64] * 50, [400] * 50), replace(BASE, speculative_config=config)).iterations
    verifications = rows["seqs"].sum()
    assert rows["drafts"].sum() / verifications == pytest.approx(3 * 0.25, rel=0.05)
    assert rows["decoded_tokens"].sum() / verifications == pytest.approx(1 + 3 * 0.25, rel=0.05)


def test_what_a_request_accepts_does_not_depend_on_its_company():
    alone, company = batch_of(EAGLE), batch_of(EAGLE)
    alone.add(decoding(7))
    for i in range(10):
        company.add(decoding(i, output=20 + i))
    other = decoding(7)
    assert batch_of(EAGLE)._draw(other).tolist() == alone._drawn[next(iter(alone))].tolist()
    assert company._drawn[list(company)[7]][:20].tolist() == alone._drawn[next(iter(alone))][:20].tolist()
    assert batch_of(EAGLE, seed=1)._draw(other).tolist() != batch_of(EAGLE)._draw(other).tolist()


def test_the_same_seed_gives_the_same_bytes():
    trace, scenario = trace_of([64] * 40, [90] * 40), replace(BASE, speculative_config=EAGLE)
    one, two, other = simulate(trace, scenario), simulate(trace, scenario), simulate(trace, replace(scenario, seed=1))
    assert one.requests["finish_s"].tobytes() == two.requests["finish_s"].tobytes()
    assert one.requests["finish_s"].tobytes() != other.requests["finish_s"].tobytes()


# ---- the batch against one without tricks -------------------------------------------------------------------------


class NaiveBatch:
    """Every member by itself, every iteration."""

    def __init__(self, batch):
        self.own, self.draw = batch._speculation, batch._draw
        self.block_tokens, self.total = batch.block_tokens, batch._total_blocks
        self.members, self.drawn, self.held = {}, {}, {}

    def add(self, request):
        self.drawn.setdefault(request.id, self.draw(request).tolist())
        self.held.setdefault(request.id, -(-request.computed_tokens // self.block_tokens))
        self.members[request.id] = [request.computed_tokens, request.output_tokens - request.generated_tokens, None]

    def drafts_of(self, i):
        cut = self.members[i][2]
        most = self.own.drafts if self.drawn[i][0] >= 0 else 0
        return most if cut is None else min(cut, most)

    def need(self, i):
        computed = self.members[i][0]
        reach = computed + 1 + self.drafts_of(i) + self.own.lookahead
        return max(0, min(-(-reach // self.block_tokens), self.total) - self.held[i])

    def tokens(self, i):
        return min(max(min(self.drawn[i][0], self.drafts_of(i)), 0) + 1, self.members[i][1])

    def coming(self):
        return sum(map(self.tokens, self.members)), sum(map(self.drafts_of, self.members))

    def truncate(self, most):
        over = self.coming()[1] - most
        for i in reversed(list(self.members)):
            cut = min(max(over, 0), self.drafts_of(i))
            if cut:
                self.members[i][2] = self.drafts_of(i) - cut
                over -= cut

    def advance(self):
        done = []
        for i in list(self.members):
            tokens, blocks = self.tokens(i), self.need(i)
            self.held[i] += blocks
            del self.drawn[i][0]
            member = self.members[i]
            member[0], member[1], member[2] = member[0] + tokens, member[1] - tokens, None
            if not member[1]:
                done.append(i)
                del self.members[i]
        return done


@pytest.mark.parametrize("seed", range(12))
def test_the_batch_equals_one_that_looks_at_every_member(seed):
    random = np.random.default_rng(seed)
    config = speculating(
        float(random.uniform(0, 1)),
        int(random.integers(1, 9)),
        random.choice(["ngram", "eagle"]),
        proposal_rate=float(random.choice([1.0, 0.6])),
    )
    batch = batch_of(config, total_blocks=80, block_tokens=int(random.choice([1, 8, 16])), seed=seed)
    naive, out, requests, made = NaiveBatch(batch), [], {}, 0
    for _ in range(400):
        if random.random() < 0.1 or not batch.size:
            requests[made] = decoding(made, int(random.integers(1, 60)), int(random.integers(2, 90)))
            batch.add(requests[made])
            naive.add(requests[made])
            made += 1
        elif random.random() < 0.05:  # sits out
            request = list(batch)[int(random.integers(batch.size))]
            batch.remove(request)
            member = naive.members.pop(request.id)
            assert request.computed_tokens == member[0]
            out.append(request)
        elif out and random.random() < 0.3:
            request = out.pop()
            batch.add(request)
            naive.add(request)
        if not batch.size:
            continue
        if random.random() < 0.1:
            most = int(random.integers(0, batch.coming()[1] + 2))
            batch.truncate(most)
            naive.truncate(most)
        assert batch.coming() == naive.coming()
        assert batch.blocks_needed(1) == sum(map(naive.need, naive.members))
        assert batch.kv_tokens == sum(member[0] for member in naive.members.values())
        assert [batch.needs_block(r) for r in batch] == [naive.need(r.id) for r in batch]
        assert [batch.computed(r) for r in batch] == [naive.members[r.id][0] for r in batch]
        assert batch.steps_to_finish() >= 1
        assert sorted(request.id for request in batch.advance(1)) == sorted(naive.advance())


# ---- KV cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "prompt", "blocks"),
    [
        ("ngram", 14, 1),  # 14 computed, 1 + 1 scheduled: 16 slots
        ("ngram", 15, 2),
        ("eagle", 13, 1),  # one more for the drafter: 16
        ("eagle", 14, 2),
    ],
)
def test_a_request_takes_its_next_block_up_to_its_drafts_and_lookahead_early(method, prompt, blocks):
    batch = batch_of(speculating(0.5, 1, method))
    batch.add(decoding(0, prompt))
    assert 1 + batch.blocks_needed(1) == blocks


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_blocks_come_back_and_gaps_add_up(seed, caching):
    """Tight memory: preemptions; every gap between two tokens is logged once and their sum is the time decoded."""
    random = np.random.default_rng(seed)
    n = 60
    trace = trace_of(random.integers(20, 200, n), random.integers(1, 200, n), np.sort(random.uniform(0, 1, n)))
    scenario = replace(
        BASE,
        speculative_config=EAGLE if seed % 2 else speculating(0.6, 6, proposal_rate=0.7),
        num_gpu_blocks_override=80,
        enable_prefix_caching=caching,
        reserve_full_isl=bool(seed % 2),
        seed=seed,
    )
    fleet = Fleet(trace, scenario)
    result = fleet.run()
    kv = fleet.replicas[0].kv
    assert kv.free_blocks == kv.total_blocks == 79
    assert result.stats["preemptions"] > 0
    assert result.finished.all()
    gaps = result.gaps
    assert (gaps["count"] * gaps["weight"]).sum() == (trace.output_tokens - 1).sum()
    decoded_s = (result.requests["finish_s"] - result.requests["first_token_s"]).sum()
    assert (gaps["gap_s"] * gaps["count"] * gaps["weight"]).sum() == pytest.approx(decoded_s, rel=1e-9)
    assert len(fleet.replicas[0]._batch._drawn) == len(fleet.replicas[0]._batch._blocks) == 0


@pytest.mark.parametrize("scheduler", sorted(set(BUILTIN) - {"vllm-native"}))
def test_it_keeps_its_books_under_every_scheduler(scheduler):
    """Padding, ghosts, pauses, swaps: whatever a policy does, answers are complete and blocks come back."""
    random = np.random.default_rng(1)
    n = 40
    trace = trace_of(random.integers(20, 200, n), random.integers(1, 150, n), np.sort(random.uniform(0, 1, n)))
    scenario = replace(
        BASE,
        scheduler=scheduler,
        speculative_config=speculating(0.6, 3, "eagle"),
        num_gpu_blocks_override=200,
        max_num_seqs=16,
        max_model_len=400,
        swap_space_gib=1.0,
    )
    fleet = Fleet(trace, scenario)
    result = fleet.run()
    kv = fleet.replicas[0].kv
    assert result.finished.all()
    assert kv.free_blocks == kv.total_blocks
    assert (result.gaps["count"] * result.gaps["weight"]).sum() == (trace.output_tokens - 1).sum()


def test_a_drafter_takes_memory_from_the_cache():
    """Llama-3.2-1B: 2.47 GB of weights, and 32 KiB a token beside the 128 of the 8B model."""
    config = speculating(0.8, 3, "draft_model", model="llama-3.2-1b")
    plain, with_model = blocks_of(BASE), blocks_of(replace(BASE, speculative_config=config))
    assert with_model == pytest.approx((plain * 131_072 * 16 - 2.47e9) / (16 * (131_072 + 32_768)), rel=0.001)
    assert blocks_of(replace(BASE, speculative_config=NGRAM)) == plain


# ---- budget, graphs, clocks ---------------------------------------------------------------------------------------


def test_drafts_count_towards_the_token_budget_and_are_cut_by_it():
    """Four requests decode, three drafts each: 16 rows. Of a budget of 10 six are left for drafts."""
    config = speculating(1.0, 3)
    scenario = replace(BASE, speculative_config=config, max_num_batched_tokens=10, max_num_seqs=4)
    rows = simulate(trace_of([2] * 4, [40] * 4), scenario).iterations
    assert (rows["seqs"] + rows["drafts"] + rows["prefill_tokens"]).max() == 10
    full = rows["seqs"] == 4
    assert set(rows["drafts"][full]) == {6}
    assert rows["decoded_tokens"][full][0] == 4 + 6


def test_a_prompt_gets_what_decodes_and_their_drafts_leave():
    scenario = replace(BASE, speculative_config=speculating(0.0, 7), max_num_batched_tokens=100, max_num_seqs=8)
    rows = simulate(trace_of([10, 500], [200, 2], [0.0, 0.1]), scenario).iterations
    beside = (rows["seqs"] == 1) & (rows["prefill_tokens"] > 0)
    assert rows["prefill_tokens"][beside].max() == 100 - 8


@pytest.mark.parametrize(
    ("seqs", "drafts", "mode"),
    [(1, 3, FULL), (128, 384, FULL), (129, 387, EAGER), (100, 299, PIECEWISE)],  # 512 rows is the largest capture
)
def test_uniform_verifications_run_as_full_graphs(seqs, drafts, mode):
    cost = cost_of(replace(BASE, speculative_config=EAGLE))
    cost.drafts = drafts
    assert cost.mode(seqs, 0) == mode


def test_ngrams_are_looked_up_by_the_host_between_two_steps():
    ngram, eagle = (cost_of(replace(BASE, speculative_config=c)) for c in (NGRAM, EAGLE))
    plain = cost_of(BASE)
    assert ngram.parts(8, 8, 8).draft_s == 0.0 < eagle.parts(8, 8, 8).draft_s
    assert ngram.host.update_per_output_s == plain.host.update_per_output_s + 20e-6
    assert not replace(BASE, speculative_config=NGRAM).resolved().async_scheduling
    assert replace(BASE, speculative_config=EAGLE).resolved().async_scheduling


def test_verification_and_drafts_cost_what_the_docstring_says():
    """By hand from the cost models without drafts: 8 requests, 3 drafts each, 1,000 cached tokens each."""
    config = speculating(0.8, 3, "draft_model", model="llama-3.2-1b")
    cost, plain = cost_of(replace(BASE, speculative_config=config)), cost_of(BASE)
    small = cost_of(replace(BASE, model="llama-3.2-1b"))
    verify_s = plain.decode_ramp(8, 8000).first_s + plain.rows_s(32, 32) - plain.rows_s(8, 8)
    first_s = small.decode_ramp(8, 8000).first_s + small.rows_s(32, 8) - small.rows_s(8, 8)
    draft_s = first_s + 2 * small.decode_ramp(8, 8000).first_s
    assert cost.decode_ramp(8, 8000).first_s == pytest.approx(verify_s + draft_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_drafter_that_never_proposes_is_no_drafter(seed):
    """The same schedule, preemptions and times as without, in a replica and a batch of its own. Without drafts a
    speculating engine's decodes are not uniform, hence piecewise (and full graphs would let attention cut sequences);
    n-grams are scheduled for synchronously."""
    random = np.random.default_rng(seed)
    n = 80
    trace = trace_of(random.integers(20, 400, n), random.integers(1, 200, n), np.sort(random.uniform(0, 2, n)))
    tight = replace(BASE, num_gpu_blocks_override=150, reserve_full_isl=False, async_scheduling=False)
    config = speculating(0.5, 3, proposal_rate=0.0, draft_host_s=0.0)
    plain = simulate(trace, replace(tight, cudagraph="piecewise"))
    silent = simulate(trace, replace(tight, cudagraph="piecewise", speculative_config=config))
    assert plain.stats["preemptions"] == silent.stats["preemptions"] > 0
    assert plain.requests["preemptions"].tolist() == silent.requests["preemptions"].tolist()
    for name in ("scheduled_s", "first_token_s", "finish_s", "preempted_s"):
        assert silent.requests[name] == pytest.approx(plain.requests[name], abs=1e-9), name


def test_work_is_counted_by_tokens_made_not_by_drafts():
    """One request, everything accepted: a third of the steps make as many tokens, and as many FLOPs are of use."""
    plain, drafted = (
        simulate(trace_of([64], [301]), replace(BASE, speculative_config=config))
        for config in ({}, speculating(1.0, 2))
    )
    work = [flops(find_model(BASE.model), result.iterations).sum() for result in (plain, drafted)]
    assert drafted.iterations["iterations"].sum() == 1 + 100
    assert work[1] == pytest.approx(work[0], rel=0.001)  # contexts are those of a verification's first token


def test_nothing_changes_where_nobody_speculates():
    trace = trace_of([64] * 30, [90] * 30)
    assert type(Fleet(trace, BASE).replicas[0]).__name__ == "Replica"


# ---- what it buys -------------------------------------------------------------------------------------------------


def test_one_request_decodes_faster_by_tokens_over_the_cost_of_a_step():
    """Alone on the GPU, TPOT falls by E over (verification and drafts) / step; prompts and host are the same."""
    trace = trace_of([512], [2000])
    plain, drafted = (simulate(trace, replace(BASE, speculative_config=c)) for c in ({}, EAGLE))
    found = latencies_s(plain.requests)["tpot"][0] / latencies_s(drafted.requests)["tpot"][0]
    row = table(replace(BASE, speculative_config=EAGLE), 1500, [1]).rows[0]
    assert found == pytest.approx(row.speedup, rel=0.03)  # 800 verifications are not yet their mean
    assert 1.5 < found < row.tokens


def test_speculation_stops_paying_as_the_batch_grows():
    found = table(replace(BASE, speculative_config=NGRAM), 1024)
    by_batch = [row.speedup for row in found.rows]
    assert by_batch[0] > 1.3
    assert by_batch[-1] < 0.7
    assert all(later < sooner * 1.02 for sooner, later in pairwise(by_batch))
    assert 32 <= found.pays_up_to <= 64
    assert found.rows[0].best_drafts == 4
    assert found.rows[-1].best_drafts == 0


def test_a_replay_agrees_on_which_side_of_it_a_batch_lies():
    """Closed loops well below and well above the batch at which four n-gram drafts at 0.5 stop paying (51)."""

    def tpot_s(clients, config):
        trace = trace_of([64] * 2 * clients, [400] * 2 * clients)
        result = simulate(trace, replace(BASE, concurrency=clients, speculative_config=config))
        return latencies_s(result.requests)["tpot"].mean()

    assert tpot_s(8, NGRAM) < tpot_s(8, {})
    assert tpot_s(200, NGRAM) > tpot_s(200, {})


def test_alone_it_speeds_up_as_leviathan_et_al_say():
    """Theorem 3.8: (1 - a^(k+1)) / ((1 - a) (k c + 1)), c a draft's seconds over a step's. It takes a verification for
    as long as a step; ours has 1 + k rows instead of 1, so it is a little slower, by less than a tenth."""
    base = replace(BASE, model="llama-3.1-70b", gpu="h100-sxm", tensor_parallel=4)
    config = speculating(0.75, 5, "draft_model", model="llama-3.2-1b", draft_host_s=0.0)
    row = table(replace(base, speculative_config=config), 256, [1]).rows[0]
    small = cost_of(replace(base, model="llama-3.2-1b"))
    c = small.decode_ramp(1, 256).first_s / row.without_s
    theorem = (1 - 0.75**6) / (0.25 * (5 * c + 1))
    assert 0.9 * theorem < row.speedup < theorem


@pytest.mark.parametrize(
    ("config", "alone", "crowded"),
    [
        (speculating(0.6, 4, "draft_model", model="llama-3.2-1b"), 1.5, 1 / 1.4),
        (speculating(0.75, 4), 2.8, 1 / 1.8),
    ],
)
def test_it_helps_a_quiet_server_and_hurts_a_busy_one_as_vllm_reports(config, alone, crowded):
    """Llama-3-70B on four H100s (vLLM's blog, 17 October 2024): a draft model on ShareGPT 1.5 times as fast at one
    request a second and 1.4 times as slow at high rates; n-grams on CNN/DailyMail 2.8 times as fast and 1.8 times as
    slow. Acceptance is not reported; these are ours: 0.6 and 0.75. Within 35 % either way."""
    base = replace(BASE, model="llama-3.1-70b", gpu="h100-sxm", tensor_parallel=4, speculative_config=config)
    quiet, busy = table(base, 512, [1, 400]).rows
    assert quiet.speedup == pytest.approx(alone, rel=0.35)
    assert busy.speedup == pytest.approx(crowded, rel=0.35)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "medusa"}, "method='medusa' is not one of ngram"),
        ({"method": "ngram"}, "num_speculative_tokens=None"),
        (speculating(0.5, 2) | {"acceptance": 1.5}, "acceptance=1.5"),
        (speculating([0.5], 2), "a list of 2"),
        ({"method": "ngram", "num_speculative_tokens": 2}, "there is no default"),
        (speculating(0.5, 2, "draft_model"), "name the draft model"),
        (speculating(0.5, 2, model="llama-3.2-1b"), "ngram has none"),
        (speculating(0.5, 2, tokens=3), "tokens: no such key"),
        (speculating(0.5, 2, proposal_rate=2), "proposal_rate=2"),
    ],
)
def test_a_wrong_table_is_refused_by_name(config, said):
    with pytest.raises(ValueError, match="speculative_config") as error:
        replace(BASE, speculative_config=config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "fields", [{"kv_allocation": "max"}, {"kv_compression": "window:512"}, {"scheduler": "vllm-native"}]
)
def test_drafts_need_blocks_that_only_grow_and_a_scheduler_that_knows_of_them(fields):
    with pytest.raises(ValueError, match=r"speculative_config.*leave one of them out"):
        replace(BASE, speculative_config=EAGLE, enable_prefix_caching=False, **fields)


def test_the_command_prints_the_crossover(capsys):
    arguments = ["speculation", "--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--batch", "1,64"]
    assert main([*arguments, "--speculative-config", json.dumps(NGRAM)]) == 0
    printed = capsys.readouterr().out
    assert "1.94 tokens a verification" in printed
    assert "It pays up to a batch of" in printed
    assert main(arguments) == 2
    assert "speculative_config is empty" in capsys.readouterr().err

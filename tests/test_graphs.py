"""CUDA graphs that are replayed on other lengths, tables and batches; threads, streams and several GPUs."""

import dataclasses
import threading

import pytest
import torch

import tilemla
from cases import Case, make_inputs
from reference import check_result, reference_of
from tilemla import interface, launch, schedule
from tilemla.launch import num_sms_of

DEVICE = torch.device("cuda", 0)
HEADS = 16
CAPTURED = (64, 20, 128, 1, 90)
# Longer than what was captured, so that requests are cut; shorter; with requests that are not there.
REPLAYED = ((3000, 700, 64, 1, 1500), (1, 0, 65, 2000, 128), (5, 6, 7, 8, 9), (0, 0, 0, 0, 0), CAPTURED)
PAGES = 60  # columns of the table
NUM_BLOCKS = 130


class Engine:
    """Buffers that stay where they are, as large as a replay may need, and the batch that lies in them."""

    def __init__(self, device=DEVICE, **case):
        batch_size = len(CAPTURED)
        self.case = Case((0,) * batch_size, num_heads_q=HEADS, causal=True, spare_columns=0, spare_pages=0)
        self.case = dataclasses.replace(self.case, **case)
        of = dict(dtype=self.case.dtype, device=device)
        self.q = torch.zeros((batch_size, self.case.seq_len_q, HEADS, 576), **of)
        self.cache = torch.zeros((NUM_BLOCKS, 64, 1, 576), **of)
        self.table = torch.zeros((batch_size + 3, PAGES), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.width = -(-max(CAPTURED) // 64)
        self.rows = HEADS * self.case.seq_len_q

    def load(self, lengths, seed):
        """Put another batch where the last one was; returns what is right for it."""
        case = dataclasses.replace(self.case, lengths=lengths, seed=seed)
        fresh = make_inputs(case)
        pages = len(fresh.k_cache)
        fresh.block_table = torch.where(fresh.block_table < pages, fresh.block_table, -1)
        self.q.copy_(fresh.q)
        self.cache.fill_(torch.nan)
        self.cache[:pages] = fresh.k_cache.to(self.cache.device)
        self.table.fill_(-1)
        self.table[: len(lengths), : fresh.block_table.shape[1]] = fresh.block_table.to(self.table.device)
        self.lengths.copy_(fresh.cache_seqlens)
        return reference_of(fresh.to(self.q.device), causal=case.causal, window=case.window)

    def decode(self, *schedule, **options):
        """The table is as narrow as the captured batch needs it: a slice of the one that the next batch needs."""
        batch_size = len(self.lengths)
        return tilemla.flash_mla_with_kvcache(
            q=self.q,
            k_cache=self.cache,
            block_table=self.table[:batch_size, : self.width],
            cache_seqlens=self.lengths,
            head_dim_v=512,
            tile_scheduler_metadata=schedule[0],
            num_splits=schedule[1] if len(schedule) > 1 else None,
            causal=True,
            window_size=self.case.window,
            **options,
        )

    def plan(self):
        return tilemla.get_mla_metadata(self.lengths, self.rows, 1)


def capture(function):
    """Capture two calls, as of two layers; returns the graph and the results."""
    graph = torch.cuda.CUDAGraph()
    # A stream of the current GPU: torch's own for captures stays on the GPU that it was first made on.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        results = function()
    return graph, results


def replay_and_check(graph, results, expected, rows=slice(None)):
    for out, lse in results:
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
    graph.replay()
    chosen = dataclasses.replace(
        expected, **{field.name: getattr(expected, field.name)[rows] for field in dataclasses.fields(expected)}
    )
    for out, lse in results:
        check_result(out[rows], lse[rows], chosen)


@pytest.fixture
def engine():
    made = Engine()
    made.load(CAPTURED, 0)
    made.decode(*made.plan())  # loads the module
    return made


def in_the_tuple_form(engine):
    planned = engine.plan()
    return [engine.decode(*planned) for _ in range(2)]


def without_num_splits(engine):
    metadata, _ = engine.plan()
    return [engine.decode(metadata) for _ in range(2)]


def filled_in_by_the_first(engine):
    planned = tilemla.get_mla_metadata()
    return [engine.decode(*planned) for _ in range(2)]


def batch_invariant(engine):
    return [engine.decode(None, batch_invariant=True) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (500, 0)], ids=str)
@pytest.mark.parametrize("seq_len_q", [1, 2])
@pytest.mark.parametrize(
    "decode_layers", [in_the_tuple_form, without_num_splits, filled_in_by_the_first, batch_invariant]
)
def test_planned_within_the_graph(decode_layers, seq_len_q, window):
    engine = Engine(seq_len_q=seq_len_q, window=window)
    engine.load(CAPTURED, 0)
    decode_layers(engine)
    graph, results = capture(lambda: decode_layers(engine))
    for seed, lengths in enumerate(REPLAYED):
        replay_and_check(graph, results, engine.load(lengths, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("leave_out", [False, True], ids=["num_splits", "without num_splits"])
def test_planned_outside_the_graph(engine, leave_out):
    """As SGLang does: each batch's plan is copied to where the graph looks for it."""
    metadata = torch.zeros((num_sms_of(DEVICE), 8), dtype=torch.int32, device=DEVICE)
    num_splits = torch.zeros(len(CAPTURED) + 20, dtype=torch.int32, device=DEVICE)

    def copy_plan():
        planned = engine.plan()
        metadata.copy_(planned[0])
        num_splits[: len(CAPTURED) + 1].copy_(planned[1])

    copy_plan()
    given = (metadata,) if leave_out else (metadata, num_splits[: len(CAPTURED) + 1])
    graph, results = capture(lambda: [engine.decode(*given) for _ in range(2)])
    for seed, lengths in enumerate(REPLAYED):
        expected = engine.load(lengths, seed)
        copy_plan()
        replay_and_check(graph, results, expected)


@pytest.mark.gpu
def test_a_smaller_batch(engine):
    """Planned for fewer requests than were captured: the others' results are nobody's, and nothing else goes wrong."""
    metadata, num_splits = (tensor.clone() for tensor in engine.plan())
    graph, results = capture(lambda: [engine.decode(metadata, num_splits)])
    for seed, lengths in enumerate(((3000, 700, 64, 1, 1500), (2000, 65, 0, 9, 9), (1, 2500, 3, 4, 5))):
        expected = engine.load(lengths, seed)
        planned = tilemla.get_mla_metadata(engine.lengths[:3], engine.rows, 1)
        metadata.copy_(planned[0])
        num_splits[:4].copy_(planned[1])  # the tail keeps what was there before
        replay_and_check(graph, results, expected, slice(3))


@pytest.mark.gpu
def test_planned_before_the_capture(engine):
    """As vLLM does: planned for each step outside, with nothing but the first tensor passed on.

    A replay looks at what the graph planned, in each of two graphs that were captured with the same tensor, and not at
    what was planned before them, whose memory is used for something else meanwhile.
    """
    step = list(engine.plan()[:1])
    captured, schedules = [], []
    for _ in range(2):
        captured.append(capture(lambda: [engine.decode(step[0]) for _ in range(2)]))
        schedules.append(step[0]._in_graph[1])
    assert schedules[0] is not schedules[1]
    size = step[0].numel()
    step.clear()
    schedules.clear()
    others = [torch.full((size,), 10**6, dtype=torch.int32, device=DEVICE) for _ in range(20)]
    for seed, lengths in enumerate(REPLAYED):
        expected = engine.load(lengths, seed)
        for graph, results in captured:
            replay_and_check(graph, results, expected)
    del others


@pytest.mark.gpu
def test_planned_once_for_all_layers_of_a_graph(engine, monkeypatch):
    calls = []
    make = schedule.make_schedule
    monkeypatch.setattr("tilemla.given.make_schedule", lambda *given, **named: calls.append(1) or make(*given, **named))
    planned, _ = engine.plan()
    graph, results = capture(lambda: [engine.decode(planned) for _ in range(5)])
    assert len(calls) == 1
    replay_and_check(graph, results, engine.load(REPLAYED[0], 1))


@pytest.mark.gpu
def test_results_in_place_within_a_graph(engine):
    out, lse = (torch.full_like(tensor, torch.nan) for tensor in engine.decode(*engine.plan()))
    graph, results = capture(
        lambda: [engine.decode(*tilemla.get_mla_metadata(), out=out, softmax_lse=lse, attn_sink=None)]
    )
    assert results[0][0] is out and results[0][1] is lse
    for seed, lengths in enumerate(REPLAYED):
        replay_and_check(graph, results, engine.load(lengths, seed))


# Threads and streams


def same_bits(left, right):
    return torch.equal(left[0].view(torch.int16), right[0].view(torch.int16)) and torch.equal(left[1], right[1])


def run_threads(work, count):
    """Run ``work(number)`` in threads that begin together; raises what one of them raised."""
    errors = []
    start = threading.Barrier(count)

    def run(number):
        try:
            start.wait(60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


THREADED = [
    Case((700, 100), num_heads_q=4, seed=1),
    Case((300, 0, 65), num_heads_q=6, num_heads_k=2, seed=2),
    Case((129,), num_heads_q=3, seq_len_q=2, causal=True, seed=3),
    Case((64, 64, 500), num_heads_q=4, dtype=torch.float16, window=(100, 0), seed=4),
]


def decode(case, inputs):
    rows = case.seq_len_q * case.num_heads_q // case.num_heads_k
    return tilemla.flash_mla_with_kvcache(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        512,
        *tilemla.get_mla_metadata(inputs.cache_seqlens, rows, case.num_heads_k),
        causal=case.causal,
        window_size=case.window,
    )


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads(device, monkeypatch, own_streams):
    """Each with calls of another kind, all of which are the first of their kind; on one stream, or on one each."""
    inputs = [make_inputs(case).to(device) for case in THREADED]
    expected = [decode(case, one) for case, one in zip(THREADED, inputs, strict=True)]
    for case, one, result in zip(THREADED, inputs, expected, strict=True):
        check_result(*result, reference_of(one, causal=case.causal, window=case.window))
    for module, name in ((launch, "_kernels"), (launch, "_modules"), (interface, "_plans"), (schedule, "_plans")):
        monkeypatch.setattr(module, name, {})
    on_gpu = device.type == "cuda"
    streams = [torch.cuda.Stream() if on_gpu and own_streams else None for _ in range(8)]
    if on_gpu:
        torch.cuda.synchronize()

    def work(number):
        case, one, right = (of[number % len(THREADED)] for of in (THREADED, inputs, expected))
        with torch.cuda.stream(streams[number]):
            for _ in range(50 if on_gpu else 5):
                result = decode(case, one)
                if on_gpu:
                    torch.cuda.current_stream().synchronize()
                assert same_bits(result, right)

    run_threads(work, 8)


# Several GPUs


@pytest.fixture
def second_gpu():
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_capability(1) != (9, 0):
        pytest.skip("needs two GPUs of compute capability 9.0")
    return torch.device("cuda", 1)


@pytest.mark.gpu
def test_tensors_of_another_gpu_than_the_current_one(second_gpu):
    """By the long way and the short one; the current device stays what it is."""
    case = dataclasses.replace(THREADED[0], lengths=(3000, 700))
    inputs = {device: make_inputs(case).to(device) for device in (DEVICE, second_gpu)}
    for current in (0, 1):
        with torch.cuda.device(current):
            for _ in range(3):
                results = [decode(case, one) for one in inputs.values()]
                assert torch.cuda.current_device() == current
            for (device, one), (out, lse) in zip(inputs.items(), results, strict=True):
                assert out.device == lse.device == device
                check_result(out, lse, reference_of(one))
    assert torch.equal(results[0][0].cpu(), results[1][0].cpu())
    states = [tensor for _ in range(2) for tensor in results[1]]
    with torch.cuda.device(0):
        out, _ = tilemla.merge_states(*states)
    assert out.device == second_gpu and torch.equal(out, results[1][0])


@pytest.mark.gpu
def test_threads_of_two_gpus(second_gpu):
    case = dataclasses.replace(THREADED[0], lengths=(3000, 700))
    devices = (DEVICE, second_gpu)
    inputs = [make_inputs(case).to(device) for device in devices]
    expected = [decode(case, one) for one in inputs]

    def work(number):
        torch.cuda.set_device(number % 2)
        for turn in range(50):
            which = (number + turn) % 2  # every other call is for the other device
            result = decode(case, inputs[which])
            torch.cuda.synchronize(devices[which])
            assert same_bits(result, expected[which])

    run_threads(work, 4)


@pytest.mark.gpu
def test_graph_on_the_second_gpu(second_gpu):
    with torch.cuda.device(second_gpu):
        engine = Engine(device=second_gpu)
        engine.load(CAPTURED, 0)
        filled_in_by_the_first(engine)
        graph, results = capture(lambda: filled_in_by_the_first(engine))
        for seed, lengths in enumerate(REPLAYED[:2]):
            replay_and_check(graph, results, engine.load(lengths, seed))

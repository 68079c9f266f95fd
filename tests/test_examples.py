"""The examples: a DeepSeek-V3 of transformers that decodes through this package, beside its own eager attention."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from paged_cache import NO_PAGE, PagedLatentCache

# Lengths of prompt and answer: less than a page, whole pages, one token less and more, an answer that prefilling gives.
LENGTHS = [(130, 5), (3, 12), (64, 9), (1, 10), (65, 4), (20, 1), (127, 8), (40, 11), (63, 3), (90, 6)]
NUM_LAYERS, NUM_HEADS, MAX_BATCH, NUM_BLOCKS = 2, 4, 3, 5


@pytest.fixture(scope="module")
def examples():
    """The examples' modules; transformers takes seconds to import, so not before a test wants them."""
    pytest.importorskip("transformers", reason="the examples' model comes from transformers, which is not installed")
    import by_heart
    import compare
    import deepseek_v3
    import serve

    return SimpleNamespace(by_heart=by_heart, compare=compare, deepseek_v3=deepseek_v3, serve=serve)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For matrices of this size, threads of one process cost more time waiting for those of another than they save."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_cache(dtype, device, num_blocks=NUM_BLOCKS):
    return PagedLatentCache(
        num_layers=NUM_LAYERS,
        num_blocks=num_blocks,
        max_requests=MAX_BATCH,
        max_tokens=max(map(sum, LENGTHS)),
        dtype=dtype,
        device=device,
    )


def make_learned(examples, device, dtype):
    """A model that knows texts of all lengths."""
    config = examples.deepseek_v3.make_config(num_layers=NUM_LAYERS, num_heads=NUM_HEADS)
    model = examples.deepseek_v3.make_model(config, dtype, device)
    texts = examples.by_heart.make_texts(LENGTHS)
    examples.by_heart.learn_by_heart(model, texts)
    return model, texts


def serve_all(examples, model, texts, cache, **options):
    """Serve the texts' prompts: the requests and the log."""
    paged = examples.deepseek_v3.PagedDeepseekV3(model, cache)
    requests = examples.serve.make_requests(texts)
    server = examples.serve.Server(paged, max_batch=MAX_BATCH, **options)
    return requests, server.run(requests)


def check_answers(examples, model, texts, requests):
    """Every token is the library's and the text's, and none of them by luck."""
    comparison = examples.compare.compare_with_library(
        model, texts, [request.tokens for request in requests], [torch.stack(request.logits) for request in requests]
    )
    assert comparison.different == ()
    assert [tuple(request.tokens) for request in requests] == [text.answer for text in texts]
    assert comparison.smallest_lead > 2 * comparison.largest_shift
    assert 0 < comparison.median_shift < 2 * comparison.library_median_shift


def test_a_cache_gives_pages_out_and_takes_them_back():
    cache = make_cache(torch.float16, torch.device("cpu"))
    first, second = cache.admit(129), cache.admit(64)
    assert cache.num_free_blocks == 1
    assert cache.admit(65) is None  # two pages
    third = cache.admit(1)
    assert cache.admit(1) is None  # no page
    pages = cache.block_table[[first, second, third]].flatten().tolist()
    assert sorted(pages) == [0, 1, 2, 3, 4] + [NO_PAGE] * 4
    cache.release(first)
    assert cache.num_free_blocks == 3
    assert (cache.block_table[first] == NO_PAGE).all()
    cache.release(second)
    assert cache.admit(1) is not None
    assert cache.admit(1) is not None
    assert cache.admit(1) is None  # no row, though there are pages
    assert cache.num_free_blocks == 2
    assert cache.block_table[cache.idle_row].tolist() == [NUM_BLOCKS, NO_PAGE, NO_PAGE]


@pytest.mark.parametrize(("tokens", "num_blocks"), [(136, 5), (129, 2)])
def test_a_cache_refuses_a_request_that_can_never_fit(tokens, num_blocks):
    with pytest.raises(ValueError, match=rf"a request of {tokens} tokens .* {num_blocks} pages .* up to 135 tokens"):
        make_cache(torch.float16, torch.device("cpu"), num_blocks).admit(tokens)


@pytest.mark.parametrize("q_lora_rank", [None, 256])
@pytest.mark.parametrize("rope_interleave", [True, False])
def test_absorbed_attention_is_as_exact_as_the_librarys(examples, device, rope_interleave, q_lora_rank):
    """One layer, a prompt in pieces and a token: against the library's eager attention in float32, same weights."""
    dtype, length, num_heads = torch.bfloat16, 100, 4
    config = examples.deepseek_v3.make_config(
        num_layers=NUM_LAYERS, num_heads=num_heads, rope_interleave=rope_interleave, q_lora_rank=q_lora_rank
    )
    model = examples.deepseek_v3.make_model(config, dtype, device)
    cache = make_cache(dtype, device)
    rows = torch.tensor([cache.admit(length)], device=device)
    attention = examples.deepseek_v3.PagedLatentAttention(model.model.layers[1].self_attn, cache.pages[1])
    hidden = torch.randn(1, length, config.hidden_size).to(device, dtype)
    positions = torch.arange(length, device=device)[None]
    mask = torch.full((length, length), -math.inf, device=device).triu(1)

    with torch.inference_mode():
        pieces = []
        for piece in (slice(0, 70), slice(70, 99), slice(99, 100)):
            step = examples.deepseek_v3.plan_step(cache, rows, positions[:, piece], num_heads)
            rope = model.model.rotary_emb(hidden, step.positions)
            pieces.append(attention(hidden[:, piece], rope, step))
        out = torch.cat(pieces, dim=1).float()

        def eager(module, dtype):
            rope = model.model.rotary_emb(hidden.to(dtype), positions)
            return module(hidden.to(dtype), position_embeddings=rope, attention_mask=mask.to(dtype))[0].float()

        expected = eager(copy.deepcopy(attention.attention).float(), torch.float32)
        rounding = (eager(attention.attention, dtype) - expected).abs()
    error = (out - expected).abs()
    assert error.max() < 2 * rounding.max()
    assert error.mean() < 1.5 * rounding.mean()
    assert rounding.max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_requests_that_come_and_go_get_the_librarys_tokens(examples, device, dtype):
    model, texts = make_learned(examples, device, dtype)
    cache = make_cache(dtype, device)
    requests, log = serve_all(examples, model, texts, cache, prefill_chunk=48)
    check_answers(examples, model, texts, requests)

    assert set(log.batch_sizes) == {1, 2, 3}
    assert any(request.admitted_at > request.arrives_at for request in requests)  # some waited
    assert cache.num_free_blocks == NUM_BLOCKS
    assert (cache.block_table[: cache.idle_row] == NO_PAGE).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_captured_step_serves_whatever_runs(examples, dtype):
    model, texts = make_learned(examples, torch.device("cuda", 0), dtype)
    requests, log = serve_all(examples, model, texts, make_cache(dtype, model.device), use_graph=True)
    check_answers(examples, model, texts, requests)
    assert set(log.batch_sizes) == {1, 2, 3}


def test_wrong_attention_gives_other_tokens(examples):
    """What the model knows depends on its attention: the comparison would see a wrong one."""
    model, texts = make_learned(examples, torch.device("cpu"), torch.bfloat16)
    scaling = model.model.layers[0].self_attn.scaling
    for layer in model.model.layers:
        layer.self_attn.scaling = 192**-0.5
    assert scaling > 1.8 * 192**-0.5  # YaRN's part was there
    requests, _ = serve_all(examples, model, texts[:6], make_cache(torch.bfloat16, model.device))
    assert [tuple(request.tokens) for request in requests] != [text.answer for text in texts[:6]]


def test_more_than_a_model_can_learn_is_refused(examples):
    config = examples.deepseek_v3.make_config(num_layers=1)
    model = examples.deepseek_v3.make_model(config, torch.bfloat16, torch.device("cpu"))
    texts = examples.by_heart.make_texts([(1, 100), (1, 29)])
    with pytest.raises(ValueError, match=r"up to 128 tokens in all .* of 512, got 129; take a hidden_size of 516"):
        examples.by_heart.learn_by_heart(model, texts)


@pytest.mark.parametrize(("prompt", "max_new_tokens"), [((), 1), ((1,), 0)])
def test_a_request_needs_a_prompt_and_an_answer(examples, prompt, max_new_tokens):
    with pytest.raises(ValueError, match=f"got {len(prompt)} and {max_new_tokens}"):
        examples.serve.Request(prompt, max_new_tokens)


def test_a_server_does_not_wait_for_pages_of_others(examples):
    config = examples.deepseek_v3.make_config(num_layers=NUM_LAYERS, num_heads=NUM_HEADS)
    model = examples.deepseek_v3.make_model(config, torch.float16, torch.device("cpu"))
    cache = make_cache(torch.float16, model.device)
    for _ in range(2):
        cache.admit(128)
    server = examples.serve.Server(examples.deepseek_v3.PagedDeepseekV3(model, cache), max_batch=MAX_BATCH)
    with pytest.raises(RuntimeError, match=r"of 65 tokens waits for pages \(free: 1\), .* cache of its own"):
        server.run([examples.serve.Request((1,) * 64, 1)])


def run_command(examples, *arguments):
    return CliRunner().invoke(examples.serve.main, list(map(str, arguments)))


def test_the_command_serves_compares_and_tells_the_time(examples, device):
    sizes = ["--requests", 4, "--max-batch", 2, "--max-prompt", 70, "--max-answer", 6, "--layers", 2, "--heads", 4]
    result = run_command(examples, "--device", device.type, "--dtype", "float16", *sizes)
    assert result.exit_code == 0, result.output
    assert "Every token is the one that the library's eager attention and cache give." in result.output
    assert re.search(r"decode: .* ms a step, [\d.]+ ms a token\nprefill: .* [\d.]+ ms a token\n", result.output)


def test_the_command_refuses_a_graph_without_a_gpu(examples):
    result = run_command(examples, "--graph")
    assert result.exit_code == 2
    assert "--graph needs a GPU" in result.stderr

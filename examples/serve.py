"""Serve requests that come and go from one paged cache, and compare every token with the library's own.

Examples
--------
::

    python examples/serve.py
    python examples/serve.py --device cuda --graph --requests 32 --max-batch 16 --max-prompt 2000
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import click
import torch

from by_heart import Text, learn_by_heart, make_texts, needed_hidden_size
from compare import compare_with_library
from deepseek_v3 import PagedDeepseekV3, make_config, make_model
from paged_cache import PAGE_BLOCK_SIZE, PagedLatentCache

_MIN_PROMPT = 4  # of shorter ones, two might be the same


@dataclass
class Request:
    """A prompt, what has been answered so far, and when."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrives_at: int = 0  # the step from which it may be admitted
    row: int | None = None  # of the block table, while it runs
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    admitted_at: int = -1
    finished_at: int = -1

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(
                "a request needs a prompt of at least 1 token and an answer of at least 1, "
                f"got {len(self.prompt)} and {self.max_new_tokens}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in the cache at the end."""
        return len(self.prompt) + self.max_new_tokens


@dataclass
class Log:
    """What a run did, step by step."""

    batch_sizes: list[int] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    prefilled_tokens: int = 0
    prefill_seconds: float = 0.0


class DecodeGraph:
    """A decode step of a fixed number of rows, captured once: a replay costs the host one launch.

    The schedule, the slots and the batch's block table are computed from the inputs inside the graph, so that a replay
    serves whatever requests run by then; rows that no request needs are idle.
    """

    def __init__(self, model: PagedDeepseekV3, max_batch: int) -> None:
        self._inputs = _make_inputs([], max_batch, model.cache)
        # The usual way through the experts may ask the device how many tokens each gets, which no graph can hold.
        usual = model.model.get_experts_implementation()
        model.model.set_experts_implementation("batched_mm")
        # Outside of capture first: libraries set themselves up, and tilemla looks for its module.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _decode(model, self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = _decode(model, self._inputs)
        model.model.set_experts_implementation(usual)

    def __call__(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one token for each column of ``inputs``; the next call overwrites what is returned."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._outputs


class Server:
    """Continuous batching: each step admits what fits, then gives every running request one token.

    Parameters
    ----------
    model : PagedDeepseekV3
        The model and its cache.
    max_batch : int
        Requests that may run at a time.
    prefill_chunk : int
        Tokens of a prompt that are read in one pass.
    use_graph : bool
        Replay a captured step instead of launching each kernel (on a GPU).
    """

    def __init__(
        self, model: PagedDeepseekV3, *, max_batch: int, prefill_chunk: int = 64, use_graph: bool = False
    ) -> None:
        self._model, self._cache = model, model.cache
        self._max_batch, self._prefill_chunk = max_batch, prefill_chunk
        self._padded_to = max_batch if use_graph else 0
        self._decode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
        with torch.inference_mode():
            self._decode = DecodeGraph(model, max_batch) if use_graph else lambda inputs: _decode(model, inputs)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Log:
        """Serve all requests to their end, in order of arrival, and return what happened."""
        log = Log()
        waiting = deque(sorted(requests, key=lambda request: request.arrives_at))
        running: list[Request] = []
        step = 0
        while waiting or running:
            while waiting and waiting[0].arrives_at <= step and len(running) < self._max_batch:
                row = self._cache.admit(waiting[0].num_tokens)
                if row is None and not running:
                    free = self._cache.num_free_blocks
                    raise RuntimeError(
                        f"a request of {waiting[0].num_tokens} tokens waits for pages (free: {free}), and none of "
                        "this server's requests holds any; give each server a cache of its own"
                    )
                if row is None:  # until pages come back
                    break
                request = waiting.popleft()
                request.row, request.admitted_at = row, step
                began = time.perf_counter()
                self._prefill(request)
                log.prefill_seconds += time.perf_counter() - began
                log.prefilled_tokens += len(request.prompt)
                running.append(request)
            running = self._dismiss(running, step)
            if running:
                began = time.perf_counter()
                self._decode_one_token(running)
                log.decode_seconds.append(time.perf_counter() - began)
                log.batch_sizes.append(len(running))
                running = self._dismiss(running, step)
            step += 1
        return log

    def _prefill(self, request: Request) -> None:
        """Read a prompt piece by piece; what follows its last token is the first of the answer."""
        device = self._cache.pages.device
        rows = torch.tensor([request.row], device=device)
        prompt = torch.tensor([request.prompt], device=device)
        positions = torch.arange(len(request.prompt), device=device)[None]
        for chunk in range(0, len(request.prompt), self._prefill_chunk):
            piece = slice(chunk, chunk + self._prefill_chunk)
            logits = self._model(prompt[:, piece], rows, positions[:, piece])
        request.tokens.append(int(logits.argmax(-1)))
        request.logits.append(logits[0])

    def _decode_one_token(self, running: Sequence[Request]) -> None:
        logits, tokens = self._decode(_make_inputs(running, self._padded_to, self._cache))
        logits = logits.clone()  # a graph writes the next ones to the same place
        for request, token, row in zip(running, tokens.tolist(), logits, strict=False):
            request.tokens.append(token)
            request.logits.append(row)

    def _dismiss(self, running: Sequence[Request], step: int) -> list[Request]:
        """Take the pages of requests that are done; return the others."""
        for request in running:
            if len(request.tokens) == request.max_new_tokens:
                self._cache.release(request.row)
                request.row, request.finished_at = None, step
        return [request for request in running if request.row is not None]


def _make_inputs(running: Sequence[Request], padded_to: int, cache: PagedLatentCache) -> torch.Tensor:
    """Return last tokens, their places and rows as (3, batch_size), so that one copy brings them to the device."""
    columns = [
        (request.tokens[-1], len(request.prompt) + len(request.tokens) - 1, request.row) for request in running
    ] + [(0, -1, cache.idle_row)] * (padded_to - len(running))
    return torch.tensor(columns).T.contiguous().to(cache.pages.device)


def _decode(model: PagedDeepseekV3, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the best token of each row."""
    tokens, positions, rows = inputs
    logits = model(tokens[:, None], rows, positions[:, None])
    return logits, logits.argmax(-1)


def make_lengths(count: int, max_prompt: int, max_answer: int, seed: int) -> list[tuple[int, int]]:
    """Return lengths of prompts and answers, of which one each is the longest."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(_MIN_PROMPT, max_prompt + 1, (count,), generator=generator).tolist()
    answers = torch.randint(1, max_answer + 1, (count,), generator=generator).tolist()
    prompts[0], answers[-1] = max_prompt, max_answer
    return list(zip(prompts, answers, strict=True))


def make_requests(texts: Sequence[Text], seed: int = 0) -> list[Request]:
    """Return a request for each text; they arrive one after the other, with up to three steps between them."""
    gaps = torch.randint(4, (len(texts),), generator=torch.Generator().manual_seed(seed))
    arrivals = (gaps.cumsum(0) - gaps[0]).tolist()
    return [Request(text.prompt, len(text.answer), arrival) for text, arrival in zip(texts, arrivals, strict=True)]


def report(requests: Sequence[Request], log: Log) -> None:
    """Print when each request ran, and how long a token took."""
    print(f"\n{'request':>8}{'prompt':>8}{'answer':>8}{'arrives':>9}{'admitted':>10}{'finished':>10}   tokens")
    for index, request in enumerate(requests):
        shown = " ".join(map(str, request.tokens[:6])) + (" ..." if len(request.tokens) > 6 else "")
        print(
            f"{index:>8}{len(request.prompt):>8}{len(request.tokens):>8}{request.arrives_at:>9}"
            f"{request.admitted_at:>10}{request.finished_at:>10}   {shown}"
        )
    tokens, steps, seconds = sum(log.batch_sizes), len(log.batch_sizes), log.decode_seconds
    print(
        f"\ndecode:  {tokens:,} tokens in {steps} steps of {min(log.batch_sizes)} to {max(log.batch_sizes)} requests, "
        f"{statistics.median(seconds) * 1e3:.2f} ms a step, {sum(seconds) / tokens * 1e3:.2f} ms a token"
    )
    print(
        f"prefill: {log.prefilled_tokens:,} tokens, {log.prefill_seconds / log.prefilled_tokens * 1e3:.2f} ms a token"
    )


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", help="Of weights and cache.")
@click.option("--requests", "count", type=click.IntRange(min=1), default=8, help="How many come.")
@click.option("--max-batch", type=click.IntRange(min=1), default=4, help="Requests that may run at a time.")
@click.option("--max-prompt", type=click.IntRange(min=_MIN_PROMPT), default=200, help="Tokens of the longest prompt.")
@click.option("--max-answer", type=click.IntRange(min=2), default=16, help="Tokens of the longest answer.")
@click.option(
    "--layers", type=click.IntRange(min=1), default=3, help="The first is dense, the others route to experts."
)
@click.option("--heads", type=click.IntRange(min=1), default=8, help="Query heads.")
@click.option("--seed", type=int, default=0, help="Of weights, texts and arrivals.")
@click.option("--graph", is_flag=True, help="On a GPU: capture the decode step in a CUDA graph.")
@click.option("--check/--no-check", default=True, help="Compare with the library's eager attention.")
def main(
    *,
    device: str,
    dtype: str,
    count: int,
    max_batch: int,
    max_prompt: int,
    max_answer: int,
    layers: int,
    heads: int,
    seed: int,
    graph: bool,
    check: bool,
) -> None:
    """Serve requests that come and go with a small random model of DeepSeek-V3's architecture."""
    where = torch.device(device)
    if graph and where.type != "cuda":
        raise click.UsageError(f"--graph needs a GPU: use it with --device cuda, got --device {device}")
    lengths = make_lengths(count, max_prompt, max_answer, seed)
    texts = make_texts(lengths, seed=seed)
    hidden_size = max(512, -(-needed_hidden_size(texts) // 256) * 256)
    config = make_config(num_layers=layers, num_heads=heads, hidden_size=hidden_size)
    model = make_model(config, getattr(torch, dtype), where, seed)
    learn_by_heart(model, texts)

    # About half of what a full batch of the longest could take: at times a request waits for pages.
    pages_each = -(-(max_prompt + max_answer) // PAGE_BLOCK_SIZE)
    cache = PagedLatentCache(
        num_layers=layers,
        num_blocks=max(pages_each, max_batch * pages_each // 2),
        max_requests=max_batch,
        max_tokens=max_prompt + max_answer,
        dtype=getattr(torch, dtype),
        device=where,
    )
    print(
        f"DeepSeek-V3 architecture, random weights: {layers} layers, {heads} heads, hidden size {hidden_size}; "
        f"{dtype} on {where}{', decode step in a CUDA graph' if graph else ''}\n"
        f"{count} requests, {max_batch} at a time, {cache.num_free_blocks} pages of {PAGE_BLOCK_SIZE} tokens"
    )
    server = Server(PagedDeepseekV3(model, cache), max_batch=max_batch, use_graph=graph)
    server.run([Request((0,), 2)])  # the first call finds or generates the module
    requests = make_requests(texts, seed)
    report(requests, server.run(requests))

    if check:
        answers, logits = [r.tokens for r in requests], [torch.stack(r.logits) for r in requests]
        found = compare_with_library(model, texts, answers, logits)
        print(
            f"\nEager attention in float32: the best logit leads by {found.smallest_lead:.2f} or more.\n"
            f"Served logits: {found.largest_shift:.2g} away from that at most, {found.median_shift:.2g} in the median; "
            f"the library's in {dtype}: {found.library_median_shift:.2g}."
        )
        if found.different:
            raise click.ClickException(f"requests {list(found.different)} got other tokens than eager attention gives")
        print("Every token is the one that the library's eager attention and cache give.")


if __name__ == "__main__":
    main()

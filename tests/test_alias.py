"""alias_flash_mla: code that imports FlashMLA gets this package, and nothing that is installed is hidden unasked."""

import importlib
import importlib.util
import random
import sys

import pytest
import torch

import tilemla
from reference import check_result, decode_reference

NAMES = ("flash_mla", "sgl_kernel", "vllm", "installed_flash_mla")


@pytest.fixture(autouse=True)
def no_modules(monkeypatch, tmp_path):
    """Begin and end without modules of these names; what lies in ``tmp_path`` can be imported."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
            del sys.modules[name]
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield
    forget()


def install(folder, name, text=""):
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(text)
    importlib.invalidate_caches()


def without_upstream():
    if importlib.util.find_spec("flash_mla") is not None:
        pytest.skip("FlashMLA itself is installed here")


def test_names():
    without_upstream()
    module = tilemla.alias_flash_mla()
    import flash_mla
    import flash_mla.flash_mla_interface as interface
    from flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
    from flash_mla.flash_mla_interface import FlashMLASchedMeta

    assert flash_mla is module and flash_mla.flash_mla_interface is interface
    assert flash_mla_with_kvcache is tilemla.flash_mla_with_kvcache is interface.flash_mla_with_kvcache
    assert get_mla_metadata is tilemla.get_mla_metadata and FlashMLASchedMeta is tilemla.FlashMLASchedMeta
    assert flash_mla_sparse_fwd is tilemla.flash_mla_sparse_fwd
    assert flash_mla.__version__ == tilemla.__version__ and "merge_states" in dir(flash_mla)
    assert importlib.util.find_spec("flash_mla").name == "flash_mla"
    names: dict = {}
    exec("from flash_mla import *", names)
    assert names["flash_mla_with_kvcache"] is tilemla.flash_mla_with_kvcache


def test_names_that_are_not_there():
    without_upstream()
    tilemla.alias_flash_mla()
    with pytest.raises(ImportError, match="flash_attn_varlen_func"):
        from flash_mla import flash_attn_varlen_func  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="flash_mla.cuda"):
        importlib.import_module("flash_mla.cuda")
    with pytest.raises(AttributeError, match="stands in for FlashMLA here, has no attribute 'interface'"):
        _ = sys.modules["flash_mla"].interface


def test_twice():
    without_upstream()
    assert tilemla.alias_flash_mla() is tilemla.alias_flash_mla() is importlib.import_module("flash_mla")


@pytest.mark.parametrize("is_imported", [False, True])
def test_what_is_installed_is_not_hidden_unasked(tmp_path, is_imported):
    install(tmp_path, "installed_flash_mla", "VERSION = 7")
    install(tmp_path, "installed_flash_mla.flash_mla_interface")
    if is_imported:
        importlib.import_module("installed_flash_mla.flash_mla_interface")
    with pytest.raises(ImportError, match=r"must not be there already, found .*__init__.py'; .* replace=True"):
        tilemla.alias_flash_mla("installed_flash_mla")
    assert importlib.import_module("installed_flash_mla").VERSION == 7
    tilemla.alias_flash_mla("installed_flash_mla", replace=True)
    for name in ("installed_flash_mla", "installed_flash_mla.flash_mla_interface"):
        assert importlib.import_module(name).get_mla_metadata is tilemla.get_mla_metadata


def test_copy_of_a_framework(tmp_path):
    """vLLM's lies in vllm.third_party.flashmla, SGLang's is the module sgl_kernel.flash_mla."""
    install(tmp_path, "vllm")
    install(tmp_path, "vllm.third_party")
    tilemla.alias_flash_mla("vllm.third_party.flashmla")
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache

    assert flash_mla_with_kvcache is tilemla.flash_mla_with_kvcache
    assert sys.modules["vllm.third_party"].flashmla.get_mla_metadata is tilemla.get_mla_metadata
    with pytest.raises(ImportError, match=r"sgl_kernel.flash_mla must have an importable parent package"):
        tilemla.alias_flash_mla("sgl_kernel.flash_mla")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (None, TypeError, "name must be a str, .* got NoneType None"),
        ("", ValueError, "name must be the name of a module"),
        ("flash-mla", ValueError, "got 'flash-mla'"),
        ("flash_mla.", ValueError, "got 'flash_mla.'"),
    ],
)
def test_bad_name(name, error, words):
    with pytest.raises(error, match=words):
        tilemla.alias_flash_mla(name)


# Upstream's test of dense decoding: inputs of a tenth, clamped, pages of all requests shuffled, NaN past each end.


def upstream_inputs(
    batch_size, seq_len_q, length, num_heads_q, num_heads_k, *, varied, with_empty=False, seed, device, dtype
):
    random.seed(seed)
    on_device = dict(generator=torch.Generator(device).manual_seed(seed), device=device)

    def values(*shape):
        return (torch.randn(shape, **on_device) / 10).clamp_(-1.0, 1.0).to(dtype)

    lengths = torch.full((batch_size,), length, dtype=torch.int32)
    if varied:
        lengths = torch.tensor([int(max(random.normalvariate(length, length / 2), seq_len_q)) for _ in lengths]).int()
    if with_empty:
        lengths[(torch.randn(batch_size, **on_device) > 0).cpu()] = 0
    columns = -(-max(int(lengths.max()), 1) // 256) * 4
    table = torch.randperm(batch_size * columns, **on_device).int().view(batch_size, columns)
    cache = values(table.numel(), 64, num_heads_k, 576)
    for row, end in zip(table, lengths.tolist(), strict=True):
        pages = -(-end // 64)
        cache[row[pages:].long()] = float("nan")
        if end % 64:
            cache[row[pages - 1], end % 64 :] = float("nan")
        row[pages:] = 2147480000
    return values(batch_size, seq_len_q, num_heads_q, 576), cache, table, lengths.to(device)


def check_upstream_case(api, causal, **case):
    q, cache, table, lengths = upstream_inputs(**case)
    metadata, num_splits = api.get_mla_metadata()
    for _ in range(2):
        out, lse = api.flash_mla_with_kvcache(q, cache, table, lengths, 512, metadata, num_splits, causal=causal)
    check_result(out, lse, decode_reference(q, cache, table, lengths, 512, causal=causal))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("num_heads_q", "num_heads_k"), [(1, 1), (9, 1), (6, 2), (8, 8)])
def test_upstreams_cases(num_heads_q, num_heads_k, causal, dtype):
    """Small ones, through the alias."""
    without_upstream()
    api = tilemla.alias_flash_mla()
    heads = dict(num_heads_q=num_heads_q, num_heads_k=num_heads_k)
    for seed, (batch_size, seq_len_q, length) in enumerate(((1, 1, 20), (2, 4, 140), (6, 2, 140))):
        shape = dict(batch_size=batch_size, seq_len_q=seq_len_q, length=length, varied=seed > 0, with_empty=seed > 1)
        check_upstream_case(api, causal, **heads, **shape, seed=seed, device="cpu", dtype=dtype)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("num_heads_k", [1, 2, 3, 8])
def test_upstreams_cases_on_a_gpu(num_heads_k, causal):
    """Its correctness cases but those with the largest caches, and its corner cases at a quarter of the length."""
    api = tilemla.alias_flash_mla(replace=True)
    shapes = [(b, s_q, length) for b in (1, 2, 6, 64) for s_q in (1, 2, 4) for length in (20, 140, 4096)]
    shapes = [shape for shape in shapes if shape[0] * shape[2] * num_heads_k <= 6 * 4096]
    cases = [(*shape, varied, False) for shape in shapes for varied in (False, True)] + [(128, 2, 1024, True, True)]
    for num_heads_q in (1, 3, 9, 63, 64, 126, 128):
        if num_heads_q % num_heads_k:
            continue
        for seed, (batch_size, seq_len_q, length, varied, with_empty) in enumerate(cases):
            shape = dict(batch_size=batch_size, seq_len_q=seq_len_q, length=length, num_heads_q=num_heads_q)
            kind = dict(num_heads_k=num_heads_k, varied=varied, with_empty=with_empty, seed=seed)
            dtype = (torch.bfloat16, torch.float16)[(seed + num_heads_q) % 2]
            check_upstream_case(api, causal, **shape, **kind, device="cuda:0", dtype=dtype)

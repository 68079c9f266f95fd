"""What can be tuned: configurations and costs, what is valid, what is tried, and how a call's costs are chosen."""

import dataclasses
import re

import pytest

from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import SHAPE_CLASSES, ScheduleCosts, costs_of_kind, formula_costs, select_schedule_costs, shape_class
from tilemla.dsl import make_programs
from tilemla.spec import SUPPORTED_SPECS, KernelSpec
from tilemla.tuning.candidates import COST_VALUES, list_configs, list_costs, parse_parameters

SM90, CPU, READING = KernelSpec(), KernelSpec(arch="cpu"), KernelSpec(kernel="read_pages")


@pytest.mark.parametrize("spec", SUPPORTED_SPECS, ids=lambda spec: spec.name)
def test_the_default_is_valid_everywhere(spec):
    assert DEFAULT_CONFIG.why_invalid(spec) is None
    assert DEFAULT_CONFIG.name == "default" and DEFAULT_CONFIG.changes() == {}


@pytest.mark.parametrize(
    "spec, changes, reason",
    [
        (SM90, dict(short_piece=-1), "short_piece must be 0 to 2147483647, got -1"),
        (SM90, dict(evict_normal_blocks=2**31), "evict_normal_blocks must be 0 to 1073741824, got 2147483648"),
        (SM90, dict(groups_left_at_handover=4), "groups_left_at_handover must be 0 to 3, got 4"),
        (SM90, dict(full_grid=2**31), "full_grid must be 0 to 2147483647, got 2147483648"),
        (SM90, dict(splits_ahead=12), "splits_ahead must be one of 2, 4, 8, got 12"),
        (CPU, dict(short_piece=8), "short_piece must be left at the default: cpu kernels are not tuned"),
        (READING, dict(short_piece=8), "short_piece must be left at the default: read_pages kernels are not tuned"),
    ],
)
def test_what_is_invalid_says_why_and_is_neither_tried_nor_built(spec, changes, reason):
    config = KernelConfig(**changes)
    assert config.why_invalid(spec) == reason
    with pytest.raises(ValueError, match=reason):
        make_programs(spec, config)
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=reason):
        list_configs(spec, {name: [value]})


@pytest.mark.parametrize("kv_format", ["dense", "dense_fp8"])
def test_the_loading_warp_heeds_which_blocks_leave_l2_first(kv_format):
    spec = KernelSpec(arch="sm_90a", kv_format=kv_format)
    config = KernelConfig(short_piece=12345, evict_normal_blocks=23456)
    text = make_programs(spec, config)["mla_decode"].func.script()
    # seek() says from which block on, and load() has a way for those and one for the blocks before them.
    assert text.count("> 12345") == text.count("+ 23456") > 0
    from tilemla.dsl.sm90 import load

    turn = rf"( +)if cursor\[{load.BLOCK}\] >= cursor\[{load.EVICT_FIRST}\]:"
    ways = re.findall(turn + r"\n(.*?)\n\1else:\n(.*?)\n(?!\1 )", text, re.DOTALL)
    assert ways
    for _, first_to_go, normal in ways:
        loads = first_to_go.count("T.tma_copy(")
        assert loads == first_to_go.count("eviction_policy=1") == normal.count("T.tma_copy(") > 0
        assert "eviction_policy" not in normal


def test_a_configuration_comes_back_from_its_fields():
    config = KernelConfig(short_piece=8, splits_ahead=4)
    assert config.name == "short_piece8-splits_ahead4"
    assert KernelConfig.from_dict(config.to_dict()) == config
    assert KernelConfig.from_dict({"short_piece": 8}) == KernelConfig(short_piece=8), "a field that came later"
    for fields, reason in (
        (config.to_dict() | {"speed": 9}, "config has no field 'speed'; its fields are short_piece, "),
        (config.to_dict() | {"full_grid": "4096"}, "config field full_grid must be int, got '4096'"),
        (config.to_dict() | {"full_grid": True}, "config field full_grid must be int, got True"),
    ):
        with pytest.raises(ValueError, match=reason):
            KernelConfig.from_dict(fields)


def test_configurations_are_tried_one_field_at_a_time():
    configs = list_configs(SM90)
    assert configs[0] == DEFAULT_CONFIG and len(configs) == len(set(configs)) > 10
    assert all(len(config.changes()) == 1 and config.why_invalid(SM90) is None for config in configs[1:])
    assert {name for config in configs for name in config.changes()} == {
        field.name for field in dataclasses.fields(KernelConfig)
    }
    assert list_configs(CPU) == [DEFAULT_CONFIG]


def test_what_is_named_is_tried_with_each_other_and_nothing_else_is():
    values = parse_parameters(["short_piece=8,16,8", "splits_ahead=8,4"])
    assert values == {"short_piece": (8, 16), "splits_ahead": (8, 4)}
    assert [config.name for config in list_configs(SM90, values)] == [
        "default",
        "short_piece8",
        "short_piece8-splits_ahead4",
        "splits_ahead4",
    ]
    assert list_costs(values) == []
    values = parse_parameters(["overhead=1,4"])
    assert list_configs(SM90, values) == [DEFAULT_CONFIG]
    costs = list_costs(values)
    assert {each.overhead for each in costs} == {1, 4}
    assert {each.combine_eighths for each in costs} == set(COST_VALUES["combine_eighths"])
    assert len(list_costs()) == len(set(list_costs())) == 350


@pytest.mark.parametrize(
    "texts, reason",
    [
        (["speed=9"], "'speed=9' must be NAME=V1,V2 with NAME one of short_piece, .*piece_64ths"),
        (["short_piece"], "'short_piece' must list integers, such as short_piece=1,2"),
        (["short_piece=1,x"], "'short_piece=1,x' must list integers"),
        (["overhead=1", "overhead=2"], "overhead was given twice"),
    ],
)
def test_bad_parameters_say_why(texts, reason):
    with pytest.raises(ValueError, match=reason):
        parse_parameters(texts)


@pytest.mark.parametrize("bad", [(16, 0, 0, 0), (0, 1024, 0, 0), (0, 0, 97, 0), (0, 0, 0, 1024), (-1, 0, 0, 0)])
def test_costs_that_the_scheduler_cannot_add_up_are_invalid(bad):
    costs = ScheduleCosts(*bad)
    name, value = next((name, value) for name, value in costs._asdict().items() if value)
    assert costs.why_invalid().startswith(f"{name} must be 0 to ") and costs.why_invalid().endswith(f"got {value}")
    with pytest.raises(ValueError, match=f"{name} must be"):
        list_costs({name: [value]})


@pytest.mark.parametrize("batch_size", [1, 2, 8, 16, 128, 4096])
@pytest.mark.parametrize("rows", [1, 16, 32, 63, 64, 65, 128, 4096])
def test_the_formula_grows_with_the_rows_of_a_tile_and_with_tiles_and_stays_valid(rows, batch_size):
    costs = formula_costs(rows, batch_size, 132)
    assert costs.why_invalid() is None
    for more in (
        formula_costs(rows + 1, batch_size, 132),
        formula_costs(rows, batch_size + 1, 132),
        formula_costs(rows, batch_size, 66),
    ):
        assert all(a <= b for a, b in zip(costs, more, strict=True))
    assert formula_costs(64, batch_size, 132) == formula_costs(4096, batch_size, 132)


@pytest.mark.parametrize(
    ("rows", "batch_size", "num_sm_parts", "costs"),
    # Measured on an H200: one request, of 64 and of 128 heads, eight, sixteen, and four of two queries; 16 heads.
    [
        (64, 1, 132, (5, 20, 4, 9)),
        (128, 1, 66, (5, 20, 5, 9)),
        (64, 8, 132, (5, 20, 15, 9)),
        (64, 16, 132, (5, 20, 28, 9)),
        (256, 4, 33, (5, 20, 28, 9)),
        (4096, 128, 2, (5, 20, 32, 9)),
        (16, 1, 132, (2, 20, 2, 9)),
    ],
)
def test_the_formula_weighs_pieces_by_the_tiles_that_are_merged(rows, batch_size, num_sm_parts, costs):
    assert formula_costs(rows, batch_size, num_sm_parts) == ScheduleCosts(*costs)


@pytest.mark.parametrize(
    ("rows", "batch_size", "num_sm_parts", "piece_64ths"),
    # Measured on an H200: one request of 128 heads, four, eight; one of four queries; 64 heads; 16.
    [
        (128, 1, 66, 3),
        (128, 4, 66, 10),
        (128, 8, 66, 20),
        (128, 1, 16, 10),
        (64, 4, 132, 5),
        (16, 1, 132, 0),
        (16, 64, 132, 20),
    ],
)
def test_costs_of_calls_with_indices_follow_the_rows_that_are_merged(rows, batch_size, num_sm_parts, piece_64ths):
    costs = costs_of_kind("indexed", rows, batch_size, num_sm_parts)
    assert costs == ScheduleCosts(2, 16, piece_64ths, 4) and costs.why_invalid() is None


def test_costs_of_fp8_caches_are_measured_where_blocks_take_longer():
    assert costs_of_kind("fp8", 128, 1, 66) == ScheduleCosts(3, 40, 1, 9)
    assert costs_of_kind("fp8", 16, 1, 132) is None and costs_of_kind("dense", 128, 1, 66) is None


def test_every_call_has_a_class_and_every_class_a_call():
    found = {
        shape_class(rows, batch_size, parts)
        for rows in (1, 32, 33, 64, 65, 256)
        for batch_size in (1, 2, 16, 17, 66, 67, 10_000)
        for parts in (1, 8, 132)
    }
    assert found == set(SHAPE_CLASSES)
    assert [shape_class(16, batch_size, 132).partition("/")[2] for batch_size in (1, 2, 3, 16, 17, 66, 67)] == [
        "alone",
        "alone",
        "deep",
        "deep",
        "some",
        "some",
        "whole",
    ]
    assert [shape_class(rows, 1, 132).partition("/")[0] for rows in (32, 33, 64, 65)] == [
        "part_tile",
        "full_tile",
        "full_tile",
        "many_tiles",
    ]


def test_selection_is_the_table_where_it_has_the_class_and_the_formula_elsewhere():
    chosen = {"full_tile/alone": ScheduleCosts(3, 24, 4, 9)}
    assert select_schedule_costs(64, 1, 132, chosen) == ScheduleCosts(3, 24, 4, 9)
    assert select_schedule_costs(64, 128, 132, chosen) == formula_costs(64, 128, 132)
    assert select_schedule_costs(16, 1, 132, chosen) == formula_costs(16, 1, 132)
    assert select_schedule_costs(64, 1, 132, {}) == formula_costs(64, 1, 132)

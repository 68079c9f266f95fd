"""What was measured: logs that are written, read and summed up, and the picture that is drawn of them."""

import dataclasses
import io
import itertools
import json
import subprocess
import sys

import pytest
from rich.console import Console

from bench_records import H100_LOG, assert_picture, context_of, record_of, run_bench
from tilemla.bench.cases import GridCase, select_cases
from tilemla.bench.record import PeerTime, Record, Reference, TimingMode, append_log, latest, read_log
from tilemla.bench.report import make_document, make_table, summarize, summary_lines
from tilemla.bench.roofline import make_roofline
from tilemla.spec import KernelSpec


@pytest.fixture
def old_log(tmp_path):
    """The first run that was logged, before there were lists of cases; lines are only ever added."""
    path = tmp_path / "old.jsonl"
    path.write_text("".join(H100_LOG.read_text().splitlines(keepends=True)[:32]))
    return path


def test_from_shows_an_old_log(old_log):
    result = run_bench("--from", old_log)
    assert result.exit_code == 0
    assert "NVIDIA H100 80GB HBM3, 3060 GB/s read, 739 TFLOPS matmul" in result.stdout
    [row] = [line for line in result.stdout.splitlines() if "b128 L4096 h16k1 s1 " in line]
    assert row.split()[-6:] == ["218.0", "83.7", "2790", "0.912", "231.4", "1.061"]
    assert "sgl_kernel.flash_mla over ours: geometric mean 1.040 of 32, least 0.998" in result.stdout


def test_a_logged_line_means_what_it_meant():
    for line in H100_LOG.read_text().splitlines():
        old = json.loads(line)
        new = json.loads(json.dumps(Record.from_dict(old).to_dict()))
        assert KernelSpec.from_dict(old.pop("spec")) == KernelSpec.from_dict(new["spec"])  # which may have more fields
        for key, value in old.items():
            # The ceilings were kept as whole numbers, so that what follows from them differs a little.
            assert new[key] == (pytest.approx(value, rel=5e-4) if isinstance(value, float) else value), key


def test_from_draws_and_needs_no_torch(old_log, tmp_path):
    arguments = ["--from", str(old_log), "--png", str(tmp_path / "roof.png"), "--json", str(tmp_path / "a.json")]
    code = (
        "import sys\nfrom tilemla.cli.bench import bench\n"
        f"bench.main({arguments!r}, standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert_picture(tmp_path / "roof.png")
    assert len(json.loads((tmp_path / "a.json").read_text())["records"]) == 32


def test_a_record_comes_back_from_a_log_as_it_was(tmp_path):
    record = record_of(
        case=GridCase.of_lengths((5, 15), 16, 4),
        host_time_us=40.0,
        peers=(PeerTime("a", 150.0, 1.5, 30.0, 8.0), PeerTime("b", 90.0, 0.9)),
        read_only=Reference(80.0, 0.8),
        even=Reference(95.0, 0.95),
        planning_us=6.0,
        failures={"c": "ValueError: no"},
        case_list="imbalanced",
        context=context_of(timing=TimingMode("clean", graph=True, rounds=9, rep_ms=30)),
    )
    append_log(tmp_path / "log.jsonl", record)
    assert read_log(tmp_path / "log.jsonl") == [record]
    fields = json.loads((tmp_path / "log.jsonl").read_text())
    assert (fields["peer"], fields["peer_time_us"], fields["peer_over_ours"]) == ("a", 150.0, 1.5)
    assert [peer["peer"] for peer in fields["other_peers"]] == ["b"]
    assert fields["shape"]["lengths"] == [5, 15]
    assert (fields["read_only_us"], fields["read_only_over_ours"], fields["even_us"]) == (80.0, 0.8, 95.0)
    assert (fields["planning_us"], fields["peer_planning_us"]) == (6.0, 8.0)
    bare = record_of(peers=(PeerTime("a", 150.0, 1.5),)).to_dict()
    assert not [name for name in bare if "read_only" in name or "even" in name or "planning" in name]


def test_the_latest_line_of_a_case_counts_and_modes_stay_apart(tmp_path):
    log = tmp_path / "log.jsonl"
    other = GridCase(2, 256, 64, 1)
    graph = record_of(time_us=50.0, context=context_of(timing=TimingMode(graph=True)))
    clean = record_of(time_us=60.0, context=context_of(timing=TimingMode("clean")))
    for record in (record_of(time_us=100.0), record_of(other, 300.0), graph, clean, record_of(time_us=200.0)):
        append_log(log, record)
    assert [record.time_us for record in latest(read_log(log))] == [200.0, 300.0, 50.0, 60.0]
    times = {
        options: [
            record["time_us"]
            for record in json.loads(run_bench("--from", log, *options, "--json", "-").stdout)["records"]
        ]
        for options in ((), ("--graph",), ("--clean",))
    }
    assert times == {(): [200.0, 300.0], ("--graph",): [50.0], ("--clean",): [60.0]}


def test_lines_of_trials_are_passed_over(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(record_of().to_dict() | {"config": {"overhead_blocks": 9}}) + "\n\n")
    append_log(log, record_of(time_us=7.0))
    assert [record.time_us for record in read_log(log)] == [7.0]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"spec": {}}', "KeyError: 'shape'"),
        (json.dumps(record_of().to_dict() | {"timing": {"speed": 1}}), "TypeError"),
        (
            json.dumps(record_of().to_dict()).replace('"total_tokens": 512', '"total_tokens": 511'),
            "has 512 tokens here",
        ),
    ],
)
def test_a_line_that_is_no_measurement_is_named(tmp_path, line, reason):
    log = tmp_path / "log.jsonl"
    append_log(log, record_of())
    log.write_text(log.read_text() + line + "\n")
    result = run_bench("--from", log)
    assert result.exit_code == 1
    assert f"{log}:2 is not a measurement" in result.stderr and reason in result.stderr


def test_several_devices_in_a_log_are_refused(tmp_path):
    log = tmp_path / "log.jsonl"
    append_log(log, record_of())
    append_log(log, record_of(context=context_of(gpu="NVIDIA H100")))
    result = run_bench("--from", log)
    assert result.exit_code == 1
    assert "several devices, NVIDIA H100, cpu" in result.stderr


def test_summaries_are_of_each_list_mode_and_quantity():
    no_ceilings = context_of(matmul_tflops=None)
    clean = context_of(matmul_tflops=None, timing=TimingMode("clean"))
    other = GridCase(2, 256, 64, 1)
    records = [
        record_of(context=no_ceilings, case_list="grid", peers=(PeerTime("a", 1.0, 2.0), PeerTime("b", 1.0, 1.0))),
        record_of(other, context=no_ceilings, case_list="grid", peers=(PeerTime("a", 1.0, 0.5),)),
        record_of(context=clean, case_list="grid", read_only=Reference(1.0, 0.9), even=Reference(1.0, 0.8)),
        record_of(context=no_ceilings, case_list="small", peers=(PeerTime("a", 1.0, 3.0),)),
    ]
    found = [
        (each.case_list, each.mode, each.quantity, each.peer, each.num_cases, round(each.geometric_mean, 6), each.least)
        for each in summarize(records)
    ]
    assert found == [
        ("grid", "dirty", "peer/ours", "a", 2, 1.0, 0.5),
        ("grid", "dirty", "peer/ours", "b", 1, 1.0, 1.0),
        ("grid", "clean", "read-only/ours", "", 1, 0.9, 0.9),
        ("grid", "clean", "even/ours", "", 1, 0.8, 0.8),
        ("small", "dirty", "peer/ours", "a", 1, 3.0, 3.0),
    ]
    assert summarize(records)[0].least_case == "b2 L256 h64k1 s1 causal bf16"
    assert make_document(records, {"c": "absent"})["missing_peers"] == {"c": "absent"}
    assert "targets" not in make_document(records, {})
    lines = summary_lines(records)
    assert lines[0] == "grid, dirty: a over ours: geometric mean 1.000 of 2, least 0.500 (b2 L256 h64k1 s1 causal bf16)"
    assert lines[2].startswith("grid, clean: read-only over ours: geometric mean 0.900 of 1, ")


def test_shares_of_ceilings_are_of_the_one_that_bounds():
    # 20 GB/s and 0.1 TFLOPS bound this case by arithmetic, 20 GB/s and 100 TFLOPS by memory.
    records = [record_of(), record_of(context=context_of(matmul_tflops=100.0))]
    found = {each.quantity: each.geometric_mean for each in summarize(records)}
    assert found == {
        "of matmul": pytest.approx(records[0].tflops / 0.1),
        "of read bandwidth": pytest.approx(records[1].bandwidth_gbs / 20),
    }
    assert [record.context.is_memory_bound(record.case) for record in records] == [False, True]


def test_columns_and_modes_appear_where_there_is_something_to_show():
    def header_of(records):
        console = Console(width=200, file=io.StringIO())
        console.print(make_table(records))
        return console.file.getvalue().splitlines()[1].split()

    rates = ["us", "TFLOPS", "GB/s", "floor/ours"]
    assert header_of([record_of()]) == ["case", *rates]
    rich = record_of(read_only=Reference(1.0, 0.9), context=context_of(timing=TimingMode("clean", graph=True)))
    assert header_of([rich]) == ["case", *rates, "read-only", "us", "/", "ours"]
    assert header_of([record_of(planning_us=5.0), rich])[:2] == ["case", "flush"]
    lines = summary_lines(
        [record_of(planning_us=5.04, peers=(PeerTime("a", 1.0, 2.0, planning_us=9.0), PeerTime("b", 1.0, 2.0)))]
    )
    assert lines[-1] == f"{record_of().case}: get_mla_metadata 5.0 us, a 9.0 us"


def many_records():
    """As many points as a run on a GPU has, with two peers, some of them at the same place."""
    context = context_of(gpu="H", read_bandwidth_gbs=3000.0, matmul_tflops=750.0)
    records = []
    for name, case in select_cases(["grid", "small", "imbalanced"]):
        time_us = max(case.num_bytes / 3e6, case.flop / 750e6) * 1.1 + 12
        peers = (PeerTime("a", time_us * 1.3, 1.3), PeerTime("b", time_us * 1.1, 1.1))
        records.append(Record(context, case, time_us, peers=peers, case_list=name))
    return records


def test_roof_is_the_lower_of_the_ceilings():
    figure = make_roofline(many_records())
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    roof = axes.lines[0].get_xydata()
    assert len(roof) > 100
    assert all(y == pytest.approx(min(x * 3.0, 750.0)) for x, y in roof)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a",
        "b",
        *(f"tilemla, batch {batch_size}" for batch_size in (128, 32, 4, 1)),
    ]


def test_points_are_where_their_rates_are():
    records = many_records()
    [axes] = make_roofline(records).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    ours = sorted((x, y) for label, points in lines.items() if label.startswith("tilemla") for x, y in points)
    assert ours == sorted((record.case.flop / record.case.num_bytes, record.tflops) for record in records)
    assert sorted(y for _, y in lines["a"]) == pytest.approx(sorted(record.tflops / 1.3 for record in records))


def test_the_measured_floor_is_drawn_where_there_is_one():
    records = many_records()
    assert "the pages read only" not in make_roofline(records).axes[0].get_legend_handles_labels()[1]
    records[3] = dataclasses.replace(records[3], read_only=Reference(200.0, 0.9))
    [axes] = make_roofline(records).axes
    [line] = (line for line in axes.lines if line.get_label() == "the pages read only")
    assert line.get_xydata().tolist() == [[records[3].intensity, pytest.approx(records[3].case.flop / 200e6)]]


def test_labels_are_many_and_do_not_touch():
    figure = make_roofline(many_records())
    [axes] = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize(
    "records, reason",
    [
        ([], "no measurement"),
        ([record_of(context=context_of(read_bandwidth_gbs=None))], "without ceilings"),
        ([record_of(), record_of(context=context_of(gpu="H100"))], "of one device, got measurements of H100, cpu"),
    ],
)
def test_a_picture_that_cannot_be_drawn_says_why(records, reason):
    with pytest.raises(ValueError, match=reason):
        make_roofline(records)

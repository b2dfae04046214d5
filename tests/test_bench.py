"""Check the published benchmarks: pictures and tables show what the records hold."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import bench_distributed
import peers
import picture
import publish
import pytest
import run
import targets
import timing
from harness import Case, Pair
from limits import Limit, share_of_limit
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from record import RESULTS, folder_name, load, publishable, row_label, table
from timing import MAX_ATTEMPTS, MAX_OTHER_LOAD, Timing, time_pair

PATHS = sorted(RESULTS.glob("*/*.json"))
ROW_PATHS = [path for path in PATHS if "rows" in load(path)]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def _texts(figure: Figure) -> list[Text]:
    """Return the texts that are drawn, which leaves out ticks beyond an axis's range."""
    figure.canvas.draw()
    hidden = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_visible() and text.get_text() and text not in hidden]


def _record(**changes: object) -> dict:
    """Return a record with one row, with these changes to the row."""
    row = {
        "op": "adamw",
        "case": "step",
        "shape": "8M",
        "peer": "torch",
        "target": 0.0,
        "unit": "s",
        "tokens": 0,
        "gptfast_cost": 1e-3,
        "peer_cost": 2e-3,
        "ratio": 2.0,
        "ratio_quartiles": [1.9, 2.1],
        "disturbed": False,
        "limit": None,
        "share_of_limit": None,
    }
    machine = {
        "cpu": "A CPU",
        "date": "2026-11-29",
        "threads": 2,
        "torch": "2",
        "torch_isa": "X",
        "gptfast_isa": "y",
    }
    record = {"machine": machine, "benchmark": "adamw", "limits": {}}
    return record | {"rows": [row | changes]}


@pytest.mark.parametrize("path", PATHS, ids=_name)
def test_texts_of_a_picture_stay_in_the_frame_and_apart(path: Path) -> None:
    record = load(path)
    figure = picture.curves(record) if "curves" in record else picture.bars(record)
    boxes = [text.get_window_extent() for text in _texts(figure)]
    plt.close(figure)
    assert len(boxes) > 4
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)


@pytest.mark.parametrize("path", ROW_PATHS, ids=_name)
def test_labels_of_a_picture_are_the_rows_of_its_json(path: Path) -> None:
    record = load(path)
    figure = picture.bars(record)
    texts = [text.get_text() for text in _texts(figure)]
    bars = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    plt.close(figure)
    rows = publishable(record)
    labels = [row_label(row) for row in rows]
    assert len(set(labels)) == len(labels)
    assert [text for text in texts if text in labels] == labels
    ratios = [f"{row['ratio']:.2f}x" for row in rows]
    assert [text for text in texts if text in ratios] == ratios
    assert bars == pytest.approx([row["ratio"] for row in rows])


@pytest.mark.parametrize("path", PATHS, ids=_name)
def test_each_record_has_its_picture_and_the_folder_of_its_cpu(path: Path) -> None:
    record = load(path)
    assert path.with_suffix(".png").exists()
    assert path.parent.name == folder_name(record["machine"]["cpu"])
    assert path.stem == record["benchmark"]


@pytest.mark.parametrize("path", ROW_PATHS, ids=_name)
def test_no_share_is_above_one_and_a_missing_one_has_a_reason(path: Path) -> None:
    for row in load(path)["rows"]:
        share = row["share_of_limit"]
        assert row["no_share_because"] if share is None else 0 < share <= 1


def test_share_of_the_tighter_limit() -> None:
    case = Case("op", "name", "shape", "peer", lambda: None, n_bytes=1e9, flops=1e9)
    gemm, memory = Limit("fp32 GEMM", 1e11), Limit("copy of 1 GB", 1e10)
    share = share_of_limit(case, 0.2, gemm, memory)
    assert share.value == pytest.approx(0.5) and share.limit is memory
    share = share_of_limit(case, 0.05, gemm, memory)
    assert share.value is None and "faster than the copy of 1 GB" in share.reason


def test_a_disturbed_case_is_measured_again_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[float] = []

    def time_once(pair: Pair, seconds: float) -> Timing:
        return Timing(1.0, 2.0, 2.0, (2.0, 2.0), 5, loads.pop(0))

    monkeypatch.setattr(timing, "_time_once", time_once)
    monkeypatch.setattr(timing, "_wait_for_quiet", lambda timeout_s: None)
    pair = Pair(int, int, int)
    loads[:] = [0.5, 0.0, 0.5]
    assert not time_pair(pair, 1.0, 1.0).disturbed and loads == [0.5]
    loads[:] = [0.4, 0.2, *[0.3] * MAX_ATTEMPTS]
    result = time_pair(pair, 1.0, 1.0)
    assert result.disturbed and result.other_load == 0.2 and len(loads) == 2
    assert MAX_OTHER_LOAD < 0.2


def test_disturbed_rows_are_published_nowhere() -> None:
    kept, left_out = _record(), _record(case="another", disturbed=True)
    kept["rows"] += left_out["rows"]
    figure = picture.bars(kept)
    texts = [text.get_text() for text in _texts(figure)]
    plt.close(figure)
    published = publish.table({"A CPU": {"adamw": kept}}, ("adamw",))
    for text in ("\n".join(texts), table(kept), published):
        assert "step" in text and "another" not in text and "disturbed" not in text


def test_a_second_cpu_adds_a_column() -> None:
    second = _record(ratio=3.0)
    second["machine"]["cpu"] = "B CPU"
    results = {"A CPU": {"adamw": _record()}, "B CPU": {"adamw": second}}
    head, _, line = publish.table(results, ("adamw",)).splitlines()
    assert head == "| operation | case | peer | A CPU | B CPU |"
    assert "**2.00x**" in line and "**3.00x**" in line


def test_targets_name_what_a_cpu_lacks_and_what_was_not_measured() -> None:
    needs_amx = next(target for target in targets.TARGETS if target.needs == targets.AMX)
    op, case, shape, peer = needs_amx.key
    row = {"op": op, "case": case, "shape": shape, "peer": peer, "ratio": needs_amx.ratio - 0.5}
    measured, lacking = _record(**row), _record()
    measured["machine"]["gptfast_isa"] = "amx"
    lacking["machine"]["gptfast_isa"] = "avx512"
    results = {"A CPU": {"train": measured}, "B CPU": {"adamw": lacking}}
    head, _, first, *others = publish.targets(results).splitlines()
    assert head.endswith("| A CPU | B CPU | CPUs with AVX512-BF16, no AMX |")
    assert first.endswith(f"| **{row['ratio']:.2f}x**, missed | — |  |")
    of_any = next(line for line in others if "| any |" in line)
    assert of_any.endswith("| not measured | not measured |  |")
    head, _, first, *_ = publish.targets({"B CPU": {"adamw": lacking}}).splitlines()
    assert head.endswith("| B CPU | CPUs with AMX | CPUs with AVX512-BF16, no AMX |")
    assert first.endswith("| — | not measured |  |")


def test_text_between_markers_is_replaced() -> None:
    results = {"A CPU": {"adamw": _record()}}
    marker, end = "<!-- figures: operations -->", "<!-- end of figures: operations -->"
    page = publish.filled(f"before\n{marker}\nold\n{end}\nafter\n", results)
    assert page.startswith(f"before\n{marker}\n\n| operation") and page.endswith(f"{end}\nafter\n")
    assert "old" not in page and publish.filled(page, results) == page
    with pytest.raises(ValueError, match="no figures named 'unknown'"):
        publish.filled("<!-- figures: unknown -->\n<!-- end of figures: unknown -->", results)


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: page.name)
def test_pages_show_the_records(page: Path) -> None:
    """`python bench/publish.py` brings a page up to date."""
    if not page.exists():
        pytest.skip(f"there is no {page.name}")
    text = page.read_text("utf-8")
    assert publish.filled(text, publish.read_results(RESULTS)) == text


def test_folder_names() -> None:
    assert folder_name("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz") == (
        "intel-xeon-platinum-8481c-2-70ghz"
    )
    assert folder_name("AMD EPYC (family 25, model 17)") == "amd-epyc-family-25-model-17"


def _dying_peer() -> peers.Peer:
    """Return a peer whose process ends by SIGILL at its first command."""
    peer = object.__new__(peers.Peer)
    peer.name = "fake"
    code = "import os, signal; input(); os.kill(os.getpid(), signal.SIGILL)"
    peer.process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return peer


def test_a_peer_that_dies_costs_its_own_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = _dying_peer()
    asks = {"its": lambda: peer.prefill([1]), "its other": lambda: peer.prefill([2])}
    cases = {"before": lambda: 1, **asks, "after": lambda: 2}
    module = SimpleNamespace(cases=lambda quick: list(cases))
    monkeypatch.setattr(run, "import_module", lambda name: module)
    monkeypatch.setattr(run, "_measure_case", lambda case, meter, quick: cases[case]())
    monkeypatch.setattr(run, "machine", dict)
    record = run.measure("engine", SimpleNamespace(summary=dict), quick=True)
    peer.close()
    assert record["rows"] == [1, 2]
    assert capsys.readouterr().err.count("no row: fake ended with signal SIGILL") == 2


def test_only_rows_whose_label_matches_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [Case("op", name, "(2, 3)", "torch", lambda: None) for name in ("fp32", "bf16")]
    monkeypatch.setattr(run, "import_module", lambda name: SimpleNamespace(cases=lambda _: shapes))
    monkeypatch.setattr(run, "_measure_case", lambda case, meter, quick: case.name)
    meter = SimpleNamespace(summary=dict)
    assert run.measure("op", meter, quick=True)["rows"] == ["fp32", "bf16"]
    assert run.measure("op", meter, quick=True, rows_like="fp32.*torch$")["rows"] == ["fp32"]


@pytest.mark.parametrize(
    ("option", "out"),
    [([], run.RESULTS), (["--rows", "bf16"], run.QUICK_OUT), (["--quick"], run.QUICK_OUT)],
    ids=["all", "rows", "quick"],
)
def test_a_record_of_some_rows_replaces_no_published_one(
    option: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "train", *option])
    assert run._arguments()[0].out == out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--out", "elsewhere"])
    assert run._arguments()[0].out == Path("elsewhere")


def test_overlap_in_a_trace(tmp_path: Path) -> None:
    """Sums that meet count once, and so do operators inside one another."""
    spans = [
        ("gptfast::sum_gradients", 0, 4),
        ("gptfast::sum_gradients", 3, 3),
        ("autograd::engine::evaluate_function: A", 2, 3),
        ("autograd::engine::evaluate_function: B", 3, 1),
        ("aten::mm", 0, 9),
    ]
    events = [{"ph": "X", "name": name, "ts": ts, "dur": dur} for name, ts, dur in spans]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*events, {"ph": "M", "name": "thread"}]}))
    assert bench_distributed.overlap(path) == pytest.approx((6e-6, 3e-6))

"""Run examples/chapter5.ipynb with few steps: every cell does what the text above it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "chapter5.ipynb"
FEWER = """\
STEPS = 6
N_LAYER, N_HEAD, N_EMBD = 1, 2, 16
BATCH_SIZE, CONTEXT = 2, 32
OUT = "runs/chapter5"
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the notebook in a kernel of its own; return what each cell printed, by its first line."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    # The test changes what the cell sets, and nothing else.
    assert set(re.findall(r"[A-Z_]+(?= ?[,=])", FEWER)) == set(
        re.findall(r"^[A-Z_]+(?= ?[,=])|(?<=, )[A-Z_]+(?= ?[,=])", parameters.source, re.M)
    )
    parameters.source = FEWER
    where = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(where)}}
    )
    client.execute()

    def text(cell: Any) -> str:
        return "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (where / "runs/chapter5/loss.png").is_file()
    images = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", ())]
    assert len(images) == 1
    return {cell.source.splitlines()[0]: text(cell) for cell in code}


def cell(printed: dict[str, str], beginning: str) -> str:
    return next(text for line, text in printed.items() if line.startswith(beginning))


def test_the_loss_is_one_number_by_three_ways(printed: dict[str, str]) -> None:
    text = cell(printed, "idx = torch.tensor")
    by_hand, of_pytorch, fused = map(float, text.splitlines()[1].split())
    assert by_hand == pytest.approx(of_pytorch, abs=2e-4) == pytest.approx(fused, abs=4e-4)
    assert 20_000 < int(re.search(r"perplexity ([\d,]+)", text)[1].replace(",", "")) < 120_000


def test_it_trains_and_resumes(printed: dict[str, str]) -> None:
    rows = re.findall(
        r"^step +(\d+)  training [\d.]+  validation ([\d.]+)$", "".join(printed.values()), re.M
    )
    assert [int(step) for step, _ in rows] == [*range(7)]
    text = cell(printed, "model.save_pretrained")
    assert "the same weights: True" in text and "continued from step 6 to step 8" in text


def test_decoding_is_shown(printed: dict[str, str]) -> None:
    lines = cell(printed, "model.eval()").splitlines()
    first = [float(re.search(r"([\d.]+)%", line)[1]) for line in lines]
    assert len(first) == 3 and first[0] >= first[1] >= first[2]
    assert cell(printed, "for options in").count("The value of") == 4


def test_it_is_kept_without_outputs() -> None:
    """What a cell printed on one machine is not what it prints on another."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    for name in re.findall(r"\]\(((?:\.\./)?[\w./]+)(?:#[\w-]+)?\)", text):
        assert (NOTEBOOK.parent / name).exists(), name

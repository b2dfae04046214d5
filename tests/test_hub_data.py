"""Test hf:NAME, data sets of the `datasets` library, on ones that were saved here. No network."""

import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from helpers import hide_library

from gptfast.cli import main
from gptfast.cli.train_data import absolute
from gptfast.data import hub
from gptfast.data.documents import Fields, find_files, read_documents, read_records
from gptfast.data.hub import parse
from gptfast.data.prepare import prepare
from gptfast.data.sources import load_data
from gptfast.data.token_files import TokenFiles
from gptfast.tokenizer.vocabulary import get_tokenizer

datasets = pytest.importorskip("datasets")
BYTE = get_tokenizer("byte")
ROWS = [{"id": i, "story": f"The cat number {i} sat on a mat."} for i in range(7)]
STORIES = [row["story"] for row in ROWS]
OTHERS = [{"id": 0, "story": "A dog came in."}]


@pytest.fixture(autouse=True)
def in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved_alone(path: str) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def saved_dict(path: str) -> None:
    parts = {"train": ROWS, "test": OTHERS}
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(path)


def parquet(path: str) -> None:
    Path(path).mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(f"{path}/train.parquet")
    datasets.Dataset.from_list(OTHERS).to_parquet(f"{path}/test.parquet")


def lines(path: str, rows: list[Any] = ROWS, name: str = "train") -> None:
    Path(path).mkdir(exist_ok=True)
    Path(path, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl(path: str) -> None:
    lines(path)
    lines(path, OTHERS, "test")


def texts(*names: str, **options: Any) -> list[str]:
    return list(read_documents(find_files(names), **options))


@pytest.mark.parametrize("save", [saved_alone, saved_dict, parquet, jsonl])
def test_rows_of_every_form(
    save: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The texts come in order, whether the field stands in the name or in its own flag."""
    monkeypatch.setattr(hub, "BATCH_ROWS", 3)
    save("data")
    split = "" if save is saved_alone else "train"
    assert texts(f"hf:data:{split}:story") == STORIES
    assert texts("hf:data", text_field="story") == STORIES
    assert "story is read, not id" in caplog.text
    if save is not saved_alone:
        both = texts("hf:data:test", "hf:data:train", text_field="story")
        assert both == [OTHERS[0]["story"], *STORIES]


def test_prepared_as_the_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    """`gptfast prepare` writes the tokens of the same rows in a file, and training takes them."""
    parquet("data")
    lines("file")
    flags = ["--tokenizer", "byte", "--out"]
    assert main(["prepare", "--data", "hf:data:train:story", *flags, "tokens"]) == 0
    of_file = ["--data", "file/train.jsonl", "--text-field", "story"]
    assert main(["prepare", *of_file, *flags, "same"]) == 0
    for name in ("train_000000.bin", "val_000000.bin"):
        assert Path("tokens", name).read_bytes() == Path("same", name).read_bytes()
    meta = json.loads(Path("tokens/meta.json").read_text())
    assert meta["sources"] == ["hf:data:train:story"] and meta["documents"] == 7
    source = load_data(["hf:data:train:story"], BYTE, (1.0,))[0]
    whole = TokenFiles(sorted(Path("tokens").glob("train*.bin")))
    assert source[: len(whole)].tolist() == whole.tensor().tolist()
    sizes = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --sample-tokens 0 --max-steps 1"
    data = ["--data", "hf:data:train:story", "--tokenizer", "byte"]
    assert main(["train", *data, *sizes.split(), "--out", "run"]) == 0
    assert main(["train", "--out", "run", "--resume", "--max-steps", "2"]) == 0
    assert main(["eval", "run", "--data", "hf:data:test:story"]) == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which day? ", "completion": "Monday."},
        {"instruction": "Which day?", "input": "", "output": "Monday."},
        {
            "messages": [
                {"role": "user", "content": "Which day?"},
                {"role": "assistant", "content": "Monday."},
            ]
        },
    ],
    ids=["prompt", "instruction", "messages"],
)
def test_examples_are_read_as_in_files(row: dict[str, Any]) -> None:
    lines("file", [row] * 2)
    datasets.Dataset.from_list([row] * 2).save_to_disk("saved")

    def read(name: str) -> list[Any]:
        return list(read_records(find_files([name]), Fields(), lambda n_bytes: None))

    found = read("hf:saved")
    assert found == read("file/train.jsonl") == read("hf:file")
    assert len(found) == 2 and found[0].prompt is not None


def test_a_field_in_the_name_is_the_text() -> None:
    """Records that have a prompt too are read as texts where the name says which field."""
    lines("file", [{"prompt": "a", "completion": "b", "text": "c"}])
    assert texts("hf:file:train:text") == ["c"]
    assert texts("hf:file") == ["a", "b"]


def test_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is there before the next thousand is read: the damage behind it is found later."""
    monkeypatch.setattr(hub, "BATCH_ROWS", 2)
    read: list[int] = []

    class Endless:
        column_names = None

        def iter(self, size: int) -> Any:
            while True:
                read.append(size)
                if len(read) > 3:
                    raise ConnectionError("the network is gone")
                yield {"text": ["one"] * size}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"train": Endless()})
    documents = read_documents(find_files(["hf:user/endless"]))
    assert next(documents) == "one" and len(read) == 1
    with pytest.raises(ValueError, match="hf:user/endless after 6 rows: the network is gone; with"):
        list(documents)
    with pytest.raises(ValueError, match="the network is gone"):
        prepare(["hf:user/endless"], "out", BYTE, progress=False)
    assert not Path("out").exists()


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((*args, options))
        return {"validation": datasets.Dataset.from_list(ROWS)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["one", "user/one", "user/one/large", "user/one/large:validation:story"]
    for name in names:
        assert texts(f"hf:{name}", text_field="story") == STORIES
    first = [("one", None), ("user/one", None), ("user/one", "large"), ("user/one", "large")]
    assert asked == [(*args, {"streaming": True, "trust_remote_code": False}) for args in first]


def test_the_same_from_another_directory(tmp_path: Path) -> None:
    jsonl("data")
    jsonl("with:colon")
    data = ("hf:data:train", "hf:./data", "hf:user/name:train", "-", "data/train.jsonl")
    assert absolute(data) == (
        f"hf:{tmp_path}/data:train",
        f"hf:{tmp_path}/data",
        *("hf:user/name:train", "-", f"{tmp_path}/data/train.jsonl"),
    )
    assert parse("hf:with:colon:test:story") == ("with:colon", "test", "story")
    assert texts("hf:with:colon:test:story") == [OTHERS[0]["story"]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:data:valid", "has no split 'valid', only train, test; name one (hf:data:train)"),
        ("hf:data:train:tale", "has no field 'tale', only id, story"),
        ("hf:data", "has no field 'text', only id, story; name it with --text-field story"),
        ("hf:alone:test", "has no split 'test', as it was saved without splits"),
        ("hf:./gone", "there is no directory gone"),
        ("hf:", "is no data set: give hf:NAME"),
        ("hf:a:b:c:d", "is no data set: give hf:NAME"),
        ("hf:empty", "cannot read hf:empty"),
        (
            "hf:several",
            "available configs: ['a', 'b']; of a directory with several, give the files",
        ),
    ],
)
def test_refused(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl("data")
    saved_alone("alone")
    Path("empty").mkdir()
    lines("several")
    both = [f"- config_name: {name}\n  data_files: train.jsonl\n" for name in "ab"]
    Path("several/README.md").write_text("".join(["---\nconfigs:\n", *both, "---\n"]))
    capsys.readouterr()
    assert main(["prepare", "--data", name, "--tokenizer", "byte", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("out").exists()


def test_a_configuration_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's message has several lines, and the names are in the second."""

    def load_dataset(*args: Any, **options: Any) -> Any:
        lines = ["Config name is missing.", "Please pick one among the available configs: ['x']"]
        raise ValueError("\n".join([*lines, "Example of usage:", "\t`load_dataset('user/one')`"]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = r"available configs: \['x'\]; name one \(hf:user/one/CONFIGURATION\)$"
    with pytest.raises(ValueError, match=said):
        texts("hf:user/one")


def test_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert main(["train", "--data", "hf:user/name", "--tokenizer", "byte", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert "cannot read hf:user/name" in error and "save_to_disk(DIRECTORY) keeps it" in error
    assert "has moved" not in error and error.count("\n") == 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, ModuleSpec("datasets", None)):  # a folder of that name is no library
        hide_library(monkeypatch, "datasets", spec)
        with pytest.raises(ValueError, match=r"pip install 'gptfast-torch\[datasets\]'"):
            find_files(["hf:user/name"])

"""Test hf:NAME, data sets of the `datasets` library, on ones that were saved here. No network."""

import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
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

    loads(monkeypatch, {"train": Endless()})
    documents = read_documents(find_files(["hf:user/endless"]))
    assert next(documents) == "one" and len(read) == 1
    with pytest.raises(ValueError, match="hf:user/endless after 6 rows: the network is gone; with"):
        list(documents)
    with pytest.raises(ValueError, match="the network is gone"):
        prepare(["hf:user/endless"], "out", BYTE, progress=False)
    assert not Path("out").exists()


def loads(monkeypatch: pytest.MonkeyPatch, data: Any, *files: str) -> list[tuple]:
    """Let the library find this on the Hub; return the list of what it is asked for."""
    asked: list[tuple] = []

    class Builder:
        config = SimpleNamespace(data_files={"train": list(files)})

        def as_streaming_dataset(self) -> Any:
            return data

    def load_dataset_builder(*args: Any) -> Builder:
        asked.append(args)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"validation": datasets.Dataset.from_list(ROWS)}
    asked = loads(monkeypatch, rows, "hf://datasets/user/one@abc/validation.jsonl")
    names = ["one", "user/one", "user/one/large", "user/one/large:validation:story"]
    for name in names:
        assert texts(f"hf:{name}", text_field="story") == STORIES
    first = [("one", None), ("user/one", None), ("user/one", "large")]
    assert asked == [*first, first[-1]]


@pytest.mark.parametrize(
    "file", ["/home/me/keys.jsonl", "file:///home/me/a.txt", "zip://a::/b.zip"]
)
def test_a_data_set_of_the_hub_has_no_files_here(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(monkeypatch, {"train": datasets.Dataset.from_list(ROWS)}, "hf://datasets/x/y@z/a", file)
    with pytest.raises(ValueError, match=rf"rows in {file}, which is no part of it; give that"):
        texts("hf:user/one:train:story")


def described(text: str) -> None:
    """Save data with a README.md that says where its rows are, beside rows of somebody else."""
    lines("data")
    lines("outside", OTHERS, "secret")
    Path("data/README.md").write_text(f"---\nconfigs:\n- config_name: a\n{text}---\n")


@pytest.mark.parametrize(
    "text",
    [
        "  data_files: ../outside/secret.jsonl\n",
        "  data_files: [train.jsonl, '../*side/*.jsonl']\n",
        "  data_files: {here}/outside/secret.jsonl\n",
        "  data_dir: ../outside\n",
        "  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: ../outside/secret.jsonl\n",
    ],
    ids=["relative", "glob", "absolute", "data_dir", "split"],
)
def test_a_directory_has_no_rows_outside_of_it(text: str, tmp_path: Path) -> None:
    described(text.format(here=tmp_path))
    # From within it too: `.` is a name like any other.
    for name in ("hf:data", f"hf:{tmp_path}/data"):
        with pytest.raises(ValueError, match="secret.jsonl, which is no part of it; give that"):
            texts(f"{name}:train:story")


def test_what_a_description_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files below the directory, which may be a link, or have links in it, as the Hub's cache."""
    described("  data_files: below/*.jsonl\n")
    Path("data/below").mkdir()
    Path("data/below/b.jsonl").symlink_to(tmp_path / "data/train.jsonl")
    Path("linked").symlink_to("data")
    for name in ("data", "linked", f"{tmp_path}/linked"):
        assert texts(f"hf:{name}:train:story") == STORIES
    monkeypatch.chdir("data")
    assert texts("hf:.:train:story") == STORIES


@pytest.mark.parametrize("save", [saved_alone, saved_dict])
def test_saved_data_has_no_rows_outside_of_it(save: Callable[[str], None]) -> None:
    save("data")
    saved_alone("outside")
    (state,) = Path("data").glob("state.json" if save is saved_alone else "train/state.json")
    values = json.loads(state.read_text())
    inside = Path("outside", values["_data_files"][0]["filename"])
    values["_data_files"] = [{"filename": str(inside.resolve())}]
    state.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="which is no part of it; give that file itself"):
        texts("hf:data", text_field="story")


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
        (
            "hf:alone:test",
            "no split 'test', as it was saved without splits; leave it out (hf:alone)",
        ),
        ("hf:alone:test:story", "leave it out (hf:alone::story)"),
        ("hf:./gone", "there is no directory gone"),
        ("hf:data/test.jsonl:train", "data/test.jsonl is a file; give it without hf:"),
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

    def load_dataset_builder(*args: Any) -> Any:
        lines = ["Config name is missing.", "Please pick one among the available configs: ['x']"]
        raise ValueError("\n".join([*lines, "Example of usage:", "\t`load_dataset('user/one')`"]))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
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


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before version 4 it ran code that a data set brought along."""
    monkeypatch.setattr(hub, "version", lambda name: "3.6.0")
    said = r"needs datasets 4 or newer, got 3.6.0: pip install -U 'gptfast-torch\[datasets\]'"
    with pytest.raises(ValueError, match=said):
        find_files(["hf:user/name"])

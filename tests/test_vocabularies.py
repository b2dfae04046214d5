"""Vocabularies where two meet: a model's, the data's, --tokenizer's; and what ends a text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Capture, done, refused, run
from helpers import random_model
from tokenizers_of_others import TEXTS, write

from gptfast import GPT, Engine, GPTConfig, generate, get_tokenizer
from gptfast.cli import main
from gptfast.generate import generate_text, stream_text
from gptfast.tokenizer.train import train_tokenizer
from gptfast.weights.open import open_weights

BYTE = get_tokenizer("byte")
SIZES = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 2 --max-steps 1".split()
TRAIN = [*SIZES[-4:], "--sample-tokens", 0, "--device", "cpu"]
TINY = [*SIZES, "--sample-tokens", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two vocabularies of one size, a text, and a run with each vocabulary."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("made")
    (root / "text.txt").write_text("the cat and the hat, the rat and the bat. " * 20)
    train_tokenizer(TEXTS, 300, root / "a")
    train_tokenizer([text.upper() for text in TEXTS], 300, root / "b")
    for name in ("a", "b"):
        args = ["train", "--data", root / "text.txt", "--tokenizer", root / name, *TINY]
        assert main([str(arg) for arg in (*args, "--out", root / f"run-{name}")]) == 0
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, in which the test runs."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def trained(capsys: Capture, *args: Any, out: str = "run") -> None:
    done(capsys, "train", "--data", "text.txt", "--out", out, *TINY, *args)


def test_init_refuses_another_vocabulary_of_the_same_size(here: Path, capsys: Capture) -> None:
    args = ["train", "--init", "run-a", "--out", "other", *TINY]
    refused(
        run(capsys, *args, "--data", "text.txt", "--tokenizer", "b"),
        "--init run-a was trained with another vocabulary",
        "which --tokenizer chose",
    )
    done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "b", "--out", "tokens")
    refused(run(capsys, *args, "--data", "tokens"), "another vocabulary", "which the data chose")
    # The same vocabulary in another place or another form is the same.
    shutil.copytree("a", "copy")
    done(capsys, *args, "--data", "text.txt", "--tokenizer", "copy")
    done(capsys, *args[:4], "third", *TINY, "--data", "text.txt")
    assert open_weights("third").vocabulary == get_tokenizer("a").sha256


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_another_tokenizer_is_refused(command: str, here: Path, capsys: Capture) -> None:
    more = {"generate": ["--prompt", "the"], "eval": ["--data", "text.txt"], "chat": []}[command]
    for other in ("b", "byte"):
        refused(
            run(capsys, command, "run-a", "--tokenizer", other, *more),
            "has another vocabulary than the one that run-a was trained with",
            "leave --tokenizer out",
        )
    if command != "chat":
        shutil.copytree("a", "copy")
        done(capsys, command, "run-a", "--tokenizer", "copy", *more)


def test_byte_on_a_model_of_gpt2s_vocabulary(here: Path, capsys: Capture) -> None:
    gpt2 = get_tokenizer("gpt2")
    random_model(vocab_size=gpt2.n_vocab, n_embd=8).save_pretrained("m", tokenizer=gpt2)
    for command, more in (("generate", ["--prompt", "a"]), ("eval", ["--data", "text.txt"])):
        result = run(capsys, command, "m", "--tokenizer", "byte", *more)
        refused(result, "--tokenizer byte has another vocabulary", "leave --tokenizer out (m has ")


def test_files_of_another_vocabulary_in_the_place_of_the_first(here: Path, capsys: Capture) -> None:
    """The run has its own copy; a model that recorded the name alone is refused."""
    trained(capsys, "--tokenizer", "a")
    before = done(capsys, "generate", "run", "--prompt", "the", "--max-new-tokens", 4, "--seed", 1)
    shutil.rmtree("a")
    shutil.copytree("b", "a")
    after = done(capsys, "generate", "run", "--prompt", "the", "--max-new-tokens", 4, "--seed", 1)
    assert after == before
    checkpoint = next(Path("run/checkpoints").glob("step-*1"))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (checkpoint / file).unlink()
    refused(run(capsys, "generate", "run", "--prompt", "the"), "trained with another vocabulary")


@pytest.mark.parametrize("tokenizer", ["a", "byte"])
def test_a_run_that_is_moved_keeps_its_vocabulary(
    tokenizer: str, here: Path, capsys: Capture
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    trained(capsys, "--tokenizer", tokenizer)
    own = get_tokenizer(tokenizer)
    args = ["--prompt", "the cat", "--max-new-tokens", 4, "--seed", 1]
    before = done(capsys, "generate", "run", *args)
    done(capsys, "convert", "run", "hf")
    shutil.rmtree("a")
    Path("elsewhere").mkdir()
    for moved in ("run", "hf"):
        shutil.move(moved, f"elsewhere/{moved}")
        assert done(capsys, "generate", f"elsewhere/{moved}", *args) == before
    checkpoint = next(Path("elsewhere/run/checkpoints").glob("step-*1"))
    for directory in (checkpoint, Path("elsewhere/hf")):
        judge = AutoTokenizer.from_pretrained(directory)
        for text in [*TEXTS, "a\n b  c\u3000"]:
            assert judge(text)["input_ids"] == own.encode(text)
        config = AutoConfig.from_pretrained(directory)
        assert (config.eos_token_id, config.bos_token_id) == (own.eot, own.eot)
    # It can also be resumed.
    resume = ["train", "--data", "text.txt", "--out", "elsewhere/run", "--resume"]
    output = done(capsys, *resume, "--max-steps", 2, "--sample-tokens", 0)
    assert "resumed from" in output


def test_token_files_and_their_vocabulary(here: Path, capsys: Capture) -> None:
    done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "a", "--out", "tokens")
    meta = json.loads(Path("tokens/meta.json").read_text())
    assert meta["vocabulary"] == get_tokenizer("a").sha256
    # Files that are named one by one are still those of the directory's vocabulary.
    args = ["train", "--data", "tokens/train_000000.bin", "--out", "run", *TINY]
    refused(run(capsys, *args, "--tokenizer", "b"), "was prepared with tokenizer")
    refused(
        run(capsys, "eval", "run-b", "--data", "tokens"),
        "was prepared with tokenizer",
        "or prepare the text again with this one",
    )


@pytest.mark.parametrize("change", ["gone", "another"])
def test_prepared_data_holds_its_vocabulary(change: str, here: Path, capsys: Capture) -> None:
    """Prepared data can be moved, and needs nothing of the place where its vocabulary lay."""
    wanted = get_tokenizer("a").sha256
    done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "a", "--out", "tokens")
    Path("tokens").rename("moved")
    shutil.rmtree("a")
    if change == "another":
        shutil.copytree("b", "a")
    for data in ("moved", "moved/train_000000.bin"):
        args = ["train", "--data", data, "--out", f"run-{len(data)}", *TINY]
        done(capsys, *args)
        assert open_weights(f"run-{len(data)}").vocabulary == wanted
        done(capsys, "eval", f"run-{len(data)}", "--data", "moved")
    # The run has the vocabulary too.
    shutil.rmtree("moved")
    done(capsys, "generate", "run-5", "--prompt", "a", "--max-new-tokens", 2)


def test_a_vocabulary_that_is_no_longer_there(here: Path, capsys: Capture) -> None:
    """Older prepared data names its place; it is told, and any other place of it will do."""
    done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "a", "--out", "tokens")
    shutil.rmtree("tokens/tokenizer")
    Path("a").rename("elsewhere")
    args = ["train", "--data", "tokens", "--out", "run", *TINY]
    place = str(here.resolve() / "a")
    refused(run(capsys, *args), "was prepared with the tokenizer in", place, "(--tokenizer)")
    done(capsys, *args, "--tokenizer", "elsewhere")
    resumed = ["train", "--out", "run", "--resume", "--max-steps", "9"]
    refused(
        run(capsys, *resumed, "--data", "text.txt", "--tokenizer", "b"),
        "was trained with another vocabulary than",
        str(here.resolve() / "b"),
        "(--tokenizer)",
    )


def test_token_files_without_a_vocabulary_are_spoken_of(
    here: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    done(capsys, "prepare", "--data", "text.txt", "--tokenizer", "a", "--out", "tokens")
    Path("tokens/meta.json").unlink()
    done(capsys, "train", "--data", "tokens", "--tokenizer", "a", "--out", "run", *TINY)
    assert "tokens do not say which tokenizer made them" in caplog.text


@pytest.mark.parametrize(
    ("rows", "args", "message"),
    [
        (257, [], "its 257 rows are too few for GPT-2's; give --tokenizer (byte has 257)"),
        (300, [], "300 rows are too few for GPT-2's; give --tokenizer"),
        (50304, ["--tokenizer", "byte"], "taking byte, which has 257 tokens, for its 50,304 rows"),
        (60000, [], "taking gpt2, which has 50,257 tokens, for its 60,000 rows"),
        (50304, [], ""),
        (257, ["--tokenizer", "byte"], ""),
    ],
)
def test_a_model_that_does_not_say_which(
    rows: int,
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    random_model(vocab_size=rows).save_pretrained(tmp_path / "m")
    code, _, errors = run(
        capsys,
        "generate",
        tmp_path / "m",
        "--prompt",
        "a",
        "--seed",
        1,
        "--max-new-tokens",
        2,
        *args,
    )
    said = errors + caplog.text
    assert message in said and (message or not said)
    assert (code != 0) == ("too few" in message)


def test_old_records_of_the_byte_tokenizer(tmp_path: Path) -> None:
    from gptfast.data.sources import load_data

    ids = torch.tensor(BYTE.encode("abc" * 40))
    from gptfast.data.token_files import write_tokens

    write_tokens(tmp_path / "train.bin", ids)
    meta = {"format": 1, "tokenizer": "byte", "n_vocab": 257, "tokens": {"train": len(ids)}}
    for recorded in ({}, {"vocabulary": "byte"}, {"vocabulary": BYTE.sha256}):
        write(tmp_path, meta_json={**meta, **recorded})
        assert len(load_data([tmp_path], BYTE, (1.0,))) == 1


def test_a_grown_vocabulary_fits(here: Path, capsys: Capture) -> None:
    """More tokens than the model has rows: only one that is used and has no row is an error."""
    from transformers import GPT2TokenizerFast

    own = get_tokenizer("a")
    random_model(vocab_size=own.n_vocab).save_pretrained("m", tokenizer=own)
    grown = GPT2TokenizerFast.from_pretrained("m")
    grown.add_special_tokens({"pad_token": "[PAD]"})
    grown.add_tokens(["hat"])
    grown.save_pretrained("m")
    args = ["--max-new-tokens", 3, "--prompt"]
    done(capsys, "generate", "m", *args, "the cat")
    refused(run(capsys, "generate", "m", *args, "the hat"), "token id 301, out of range")
    Path("cats.txt").write_text("the cat and the rat. " * 30)
    tune = ["train", "--init", "m", "--out", "run", *TRAIN]
    done(capsys, *tune, "--data", "cats.txt", "--max-length", 16)
    done(capsys, "eval", "m", "--data", "cats.txt")
    for command in (["eval", "m"], [*tune[:3], "--out", "other", *TINY, "--max-length", 16]):
        refused(run(capsys, *command, "--data", "text.txt"), "token 301, 'hat'", "300 tokens only")


# Ids that no token has.


def padded_model(rows: int = 320) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=rows, block_size=32, n_layer=1, n_head=1, n_embd=16)).eval()


@pytest.mark.parametrize("kind", ["model", "engine"])
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"temperature": 0.0},
        {"seed": 2, "repetition_penalty": 1.3},
        {"seed": 3, "top_k": 300},
        {"num_beams": 3},
        {"seed": 4, "lookup": True},
    ],
    ids=["drawn", "greedy", "penalty", "top-k", "beams", "lookup"],
)
def test_an_id_without_a_token_is_never_drawn(kind: str, options: dict[str, Any]) -> None:
    model = padded_model()
    if options.get("lookup") and kind == "model":
        pytest.skip("a model alone does not guess")
    decoder = Engine(model) if kind == "engine" else model
    prompts = [[1, 2], [97, 300, 98]]
    free = generate(decoder, prompts, 40, **options)
    rows = generate(decoder, prompts, 40, tokenizer=BYTE, **options)
    assert [i for row in rows for i in row[3:] if i >= BYTE.n_vocab] == []
    assert "num_beams" in options or any(i >= BYTE.n_vocab for row in free for i in row[3:])
    text = generate_text(decoder, BYTE, "ab", 20, **options)
    assert text.startswith("ab")


def test_the_rest_is_drawn_as_without_those_ids() -> None:
    """The draws are those of a model whose vocabulary ends with the tokenizer's."""
    model = padded_model()
    cut = GPT(GPTConfig(**{**vars(model.config), "vocab_size": BYTE.n_vocab})).eval()
    state = model.state_dict()
    state["wte.weight"] = state["wte.weight"][: BYTE.n_vocab]
    cut.load_state_dict(state)
    for options in ({"seed": 5}, {"seed": 6, "top_p": 0.9}, {"seed": 7, "min_p": 0.1}):
        wanted = generate(cut, [[1, 2, 3]], 30, **options)
        for decoder in (model, Engine(model)):
            assert generate(decoder, [[1, 2, 3]], 30, tokenizer=BYTE, **options) == wanted


def test_a_vocabulary_with_holes(tmp_path: Path) -> None:
    class Holes:
        name, n_vocab, eot = "holes", 320, 256
        tokens = {i: b"x" for i in range(0, 320, 2)}

        def encode(self, text: str, allowed_special: Any = ()) -> list[int]:
            return [0] * len(text)

        def decode(self, ids: Any) -> str:
            return "x" * len(ids)

        def decode_bytes(self, ids: Any) -> bytes:
            return b"x" * len(ids)

    rows = generate(padded_model(), [[1]], 60, seed=1, tokenizer=Holes())
    assert {i % 2 for i in rows[0][1:]} == {0}


# What ends a text.


ENDS: dict[str, tuple[Any, Any, list[int]]] = {
    "config": (7, ..., [7]),
    "list": ([7, 9], ..., [7, 9]),
    "generation": (5, 7, [7]),
    "generation-list": (5, [7, 9], [7, 9]),
    "null": (None, ..., []),
    "no-row": (50256, ..., []),
    "absent": (..., ..., []),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_that_the_files_name(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    in_config, in_generation, wanted = ENDS[name]
    random_model(vocab_size=60).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config.pop("eos_token_id")
    config |= {} if in_config is ... else {"eos_token_id": in_config}
    write(tmp_path / "m", config_json=config)
    if in_generation is not ...:
        write(tmp_path / "m", generation_config_json={"eos_token_id": in_generation})
    model = GPT.from_pretrained(tmp_path / "m")
    assert list(model.eos_ids) == wanted
    if wanted:
        judge = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        found, _ = judge._prepare_generation_config(None)
        judge._prepare_special_tokens(found, False, device="cpu")
        assert found._eos_token_tensor.tolist() == wanted
    # They stay in every form that can hold them.
    model.save_pretrained(tmp_path / "again")
    Engine(model).save(tmp_path / "packed")
    assert list(GPT.from_pretrained(tmp_path / "again").eos_ids) == wanted
    assert list(Engine(tmp_path / "packed").eos_ids) == wanted


@pytest.mark.parametrize("kind", ["model", "engine"])
def test_any_of_several_ends_a_text(kind: str) -> None:
    model = padded_model(257)
    decoder: Any = Engine(model) if kind == "engine" else model
    free = generate(decoder, [[1]], 30, seed=1)[0][1:]
    first = min(free.index(free[9]), free.index(free[14]))
    ends = [free[14], free[9]]
    assert generate(decoder, [[1]], 30, seed=1, eos_id=ends)[0][1:] == free[: first + 1]
    model.eos_ids = (free[9], free[14])
    decoder = Engine(model) if kind == "engine" else model
    text = generate_text(decoder, BYTE, "\x01", 30, seed=1)
    assert text == BYTE.decode([1, *free[: first + 1]])
    assert "".join(stream_text(decoder, BYTE, "\x01", 30, seed=1)) == text[1:]
    for beams in (1, 3):
        found = generate(decoder, [[1]], 8, num_beams=beams, eos_id=list(range(257)))[0]
        assert len(found) == 2


@pytest.mark.parametrize(
    ("theirs", "wanted"),
    [
        ([5, 9], [5, 9, 256]),
        ([256, 7], [256, 7]),
        (5, [5, 256]),
        (256, [256]),
        (None, [256]),
        ([5, 270], [5, 256]),  # a row that fills the matrix
    ],
    ids=str,
)
def test_fine_tuning_keeps_the_ends_of_the_model(
    theirs: Any, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    random_model(vocab_size=280, block_size=16).save_pretrained("m", tokenizer=BYTE)
    config = json.loads(Path("m/config.json").read_text())
    write(tmp_path / "m", config_json={**config, "eos_token_id": theirs})
    Path("a.txt").write_text("one text " * 20)
    done(capsys, "train", "--init", "m", "--data", "a.txt", "--out", "run", *TRAIN)
    assert list(GPT.from_pretrained("run").eos_ids) == wanted
    done(capsys, "train", "--out", "run", "--resume", "--max-steps", 2)
    again = GPT.from_pretrained("run")
    assert list(again.eos_ids) == wanted
    done(capsys, "convert", "run", "copy")
    assert list(Engine("copy").eos_ids) == wanted


@pytest.mark.parametrize("bad", ["x", 1.5, [1, "2"], {"a": 1}, True])
def test_ends_that_are_no_ids(bad: Any, tmp_path: Path) -> None:
    random_model(vocab_size=60).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, config_json={**config, "eos_token_id": bad})
    with pytest.raises(ValueError, match="eos_token_id is .*, neither an id nor a list of ids"):
        GPT.from_pretrained(tmp_path)


def test_ends_that_contradict_each_other_are_spoken_of(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    random_model(vocab_size=257).save_pretrained(tmp_path / "m", tokenizer=BYTE)
    config = json.loads((tmp_path / "m/config.json").read_text())
    args = ["generate", tmp_path / "m", "--prompt", "a", "--max-new-tokens", 2]
    for ends in (256, [5, 256]):
        write(tmp_path / "m", config_json={**config, "eos_token_id": ends})
        done(capsys, *args)
    assert not caplog.text
    write(tmp_path / "m", config_json={**config, "eos_token_id": [5, 9]})
    done(capsys, *args)
    assert "ends a text at id 5, 9" in caplog.text


def test_a_draft_of_another_vocabulary(here: Path, capsys: Capture) -> None:
    args = ["generate", "run-a", "--prompt", "the", "--max-new-tokens", 4, "--draft"]
    refused(run(capsys, *args, "run-b"), "--draft run-b has another vocabulary than run-a")
    done(capsys, *args, "run-a")


def test_a_packed_model_keeps_its_vocabulary(here: Path, capsys: Capture) -> None:
    done(capsys, "convert", "run-a", "packed", "--dtype", "int8")
    shutil.rmtree("a")
    args = ["generate", "packed", "--prompt", "the", "--max-new-tokens", 4]
    done(capsys, *args)
    refused(run(capsys, *args, "--tokenizer", "b"), "has another vocabulary than the one that")

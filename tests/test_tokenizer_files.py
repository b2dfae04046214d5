"""Vocabularies in every form: the same ids as transformers' tokenizers, or a refusal by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers_of_others import EOT, SHAPES, TEXTS, added, base, random_texts, whole, write

from gptfast import get_tokenizer
from gptfast.tokenizer.bpe import BPETokenizer, compatible, same_vocabulary
from gptfast.tokenizer.words import ListedMerges, TiktokenWords

pytest.importorskip("tokenizers")
N_TEXTS = int(os.environ.get("GPTFAST_TEST_TEXTS", "400"))
"""How many random texts each form is tried on; 10,000 take a few seconds a form."""


def make(name: str, directory: Path) -> Path:
    SHAPES[name](directory)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return directory


def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", SHAPES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = make(name, tmp_path)
    judge, ours = theirs(directory), get_tokenizer(str(directory))
    names = list(judge.get_added_vocab())
    assert set(ours.special_tokens) <= set(names)
    for text in random_texts(N_TEXTS, [*names, EOT, "</s>"], seed=1):
        assert ours.encode(text, "all") == judge(text)["input_ids"], text
        split = judge(text, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == split, text


@pytest.mark.parametrize("name", SHAPES)
def test_ends_and_sizes(name: str, tmp_path: Path) -> None:
    directory = make(name, tmp_path)
    judge, ours = theirs(directory), get_tokenizer(str(directory))
    assert ours.n_vocab == max(judge.get_vocab().values()) + 1
    assert set(ours.tokens) == set(judge.get_vocab().values())
    if judge.eos_token_id is None:
        with pytest.raises(ValueError, match="names no end-of-text token: give it an eos_token"):
            assert ours.eot
    else:
        assert (ours.eot, ours.bos) == (judge.eos_token_id, judge.bos_token_id)


@pytest.mark.parametrize("name", SHAPES)
def test_files_written_again_give_the_same_ids(name: str, tmp_path: Path) -> None:
    ours = get_tokenizer(str(make(name, tmp_path / "first")))
    assert isinstance(ours, BPETokenizer)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file, text in ours.transformers_files().items():
        (copy / file).write_text(text, "utf-8")
    (copy / "config.json").write_text('{"model_type": "gpt2"}')
    judge, again = theirs(copy), get_tokenizer(str(copy))
    assert again.sha256 == ours.sha256
    for text in random_texts(100, list(ours.special_tokens), seed=2):
        assert ours.encode(text, "all") == again.encode(text, "all") == judge(text)["input_ids"]


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("no-bytes", "few-bytes")])
def test_decoding_gives_the_text_back(name: str, tmp_path: Path) -> None:
    ours = get_tokenizer(str(make(name, tmp_path)))
    for text in random_texts(200, [], seed=3):
        ids = ours.encode_continuation(text)
        if name == "flags":  # é is an added token: the symbol of a byte, which has its id
            text = text.replace("é", "\ufffd")
        assert ours.decode(ids) == text


def test_which_words_are_whose_work(tmp_path: Path) -> None:
    """tiktoken does the usual vocabularies; only merges that it cannot follow are Python's."""
    kinds = {}
    for name in ("crlf", "specials-first", "backend", "odd-merges", "few-bytes"):
        kinds[name] = type(get_tokenizer(str(make(name, tmp_path / name)))._words)
    slow = {name for name, kind in kinds.items() if kind is ListedMerges}
    assert slow == {"odd-merges", "few-bytes"}
    assert set(kinds.values()) == {ListedMerges, TiktokenWords}


def test_a_long_word_of_listed_merges(tmp_path: Path) -> None:
    directory = make("odd-merges", tmp_path)
    judge, ours = theirs(directory), get_tokenizer(str(directory))
    for text in ("the" * 5000, "a" * 20_000, "\u3000" * 5000, "thecat" * 3000):
        assert ours.encode(text) == judge(text)["input_ids"]


def small(directory: Path, **changes: Any) -> None:
    """Write a tokenizer.json with these changes."""
    vocab, merges = base(directory / "base", 300)
    write(directory, tokenizer_json={**whole({**vocab, EOT: len(vocab)}, merges), **changes})


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SEQUENCE = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, LEVEL]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": {"type": "Unigram", "vocab": []}}, "its model is Unigram, not BPE"),
    "word-piece": ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is WordPiece"),
    "normalizer": ({"normalizer": {"type": "NFC"}}, "the normalizer NFC"),
    "split": ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer Whitespace"),
    "digits": ({"pre_tokenizer": SEQUENCE}, "the pre-tokenizer Digits"),
    "no-split": ({"pre_tokenizer": None}, "it has no pre-tokenizer"),
    "one-word": ({"pre_tokenizer": {**LEVEL, "use_regex": False}}, "does not split text"),
    "after": ({"post_processor": {"type": "Mystery"}}, "the post-processor Mystery"),
    "no-model": ({"model": None}, "tokenizer.json does not fit"),
    "added": ({"added_tokens": [{"id": 1}]}, "the added tokens .* do not fit"),
    "added-text": ({"added_tokens": "x"}, "the added tokens .* do not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    small(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        get_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("field", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_fields_of_the_model_that_change_ids(field: str, tmp_path: Path) -> None:
    vocab, merges = base(tmp_path / "base", 300)
    value = 0.1 if field == "dropout" else "##"
    write(tmp_path, tokenizer_json=whole(vocab, merges, model={field: value}))
    with pytest.raises(ValueError, match=f"its model has {field}"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "\xff", '{"a": 1, "a": 2}', "null"])
def test_damaged_files_beside_a_vocabulary(name: str, content: str, tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}.json does not fit"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", [5, [1], {"lstrip": True}, {"content": "x", "lstrip": "yes"}])
def test_special_tokens_that_are_none(value: Any, tmp_path: Path) -> None:
    small(tmp_path)
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer", "eos_token": value})
    with pytest.raises(ValueError, match="the added tokens .* do not fit"):
        get_tokenizer(str(tmp_path))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    small(tmp_path)
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "BertTokenizer"})
    with pytest.raises(ValueError, match="names the tokenizer 'BertTokenizer'"):
        get_tokenizer(str(tmp_path))


def test_contradictions_are_spoken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small(tmp_path, pre_tokenizer={**LEVEL, "add_prefix_space": True})
    write(tmp_path, tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer"}, vocab_json={"a": 1})
    ours = get_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text) == theirs(tmp_path)(text)["input_ids"]
    assert "add_prefix_space is True in tokenizer.json; taking False" in caplog.text
    assert "has another vocabulary than tokenizer.json beside it" in caplog.text


def test_tokens_that_no_merge_makes_are_spoken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocab, merges = base(tmp_path / "base", 300)
    del vocab["\xff"]
    write(tmp_path, vocab_json={**vocab, "<pad>": 400}, merges_txt="\n".join(merges))
    ours = get_tokenizer(str(tmp_path))
    assert ours.decode([400]) == "<pad>" and ours.encode("<pad>") != [400]
    assert "has 1 tokens that no merge makes, such as '<pad>'" in caplog.text
    assert "has no token for 1 of the 256 bytes, such as 0xFF" in caplog.text


def test_allowed_special_tokens_by_their_own_names(tmp_path: Path) -> None:
    ours = get_tokenizer(str(make("specials-first", tmp_path)))
    assert ours.special_tokens == {"<s>": 0, "</s>": 1, "<unk>": 2}
    assert ours.encode("a<s>b</s>", {"</s>"}) == ours.encode("a<s>b") + [1]
    assert ours.encode("a<s>b</s>", "all")[-1] == 1
    with pytest.raises(ValueError, match="no special token '<pad>'; there are <s>, </s>, <unk>"):
        ours.encode("a", {"<pad>"})


def test_what_opens_a_text_stands_there_once(tmp_path: Path) -> None:
    """A document in pieces, a prompt with its completion: one beginning, no space in the middle."""
    ours = get_tokenizer(str(make("prefix-space-bos", tmp_path)))
    first, rest = "the cat", "and the rat"
    bos = ours.bos
    assert ours.encode(first)[0] == bos
    assert ours.encode_opening(first) == ours.encode(first)
    assert ours.decode(ours.encode_opening(first)) == f"{EOT} the cat"
    assert bos not in ours.encode_continuation(rest)
    assert ours.decode(ours.encode_continuation(rest)) == rest


def test_fingerprints(tmp_path: Path) -> None:
    """They are of the ids' meaning alone: not of the place or the form, but of every token."""
    gpt2, byte = get_tokenizer("gpt2"), get_tokenizer("byte")
    assert gpt2.sha256 == "669ab488f5f886a7276f1aa4d9eb2b22ca0b20f52a6ff6f98e249e46433aea5e"
    assert get_tokenizer(str(make("gpt2", tmp_path / "a"))).sha256 == gpt2.sha256
    grown = get_tokenizer(str(make("gpt2-json", tmp_path / "b")))
    assert grown.sha256 != gpt2.sha256
    assert compatible(grown, gpt2) and not compatible(gpt2, byte)
    (tmp_path / "byte").mkdir()
    for name, text in byte.transformers_files().items():
        (tmp_path / "byte" / name).write_text(text)
    copy = get_tokenizer(str(tmp_path / "byte"))
    assert copy.sha256 == byte.sha256 and same_vocabulary("byte", copy)
    assert copy.encode("naïve 日本\x00") == byte.encode("naïve 日本\x00")
    small(tmp_path / "one")
    raw = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    one = get_tokenizer(str(tmp_path / "one"))
    vocab = raw["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    write(tmp_path / "two", tokenizer_json=raw)
    two = get_tokenizer(str(tmp_path / "two"))
    assert one.n_vocab == two.n_vocab and one.sha256 != two.sha256 and not compatible(one, two)
    raw["added_tokens"] = [added(len(vocab), "[PAD]", special=True)]
    write(tmp_path / "three", tokenizer_json=raw)
    assert compatible(two, get_tokenizer(str(tmp_path / "three")))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", {"model": None}, "it has another form than usual"),
        ("tokenizer.json", {}, "it has no 'model'"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "it has another form than usual"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "'x' is no id"),
        ("added_tokens.json", {"a": []}, "it has another form than usual"),
    ],
)
def test_values_of_another_form(
    file: str, content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The message is in the words of the file, not of Python."""
    vocab, merges = base(tmp_path / "base")
    write(tmp_path, tokenizer_json=whole(vocab, merges))
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        get_tokenizer(str(tmp_path))
    assert "object" not in str(caught.value) and "NoneType" not in str(caught.value)

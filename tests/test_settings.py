"""Test settings in layers: defaults, --init, a resumed run's settings, a TOML file, flags."""

import dataclasses
import shutil
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from commands import TINY, Capture, done, refused, rows, run
from hypothesis import given
from hypothesis import strategies as st

from gptfast import GPTConfig, TrainConfig
from gptfast.cli import main, parse
from gptfast.cli.settings import apply, flat, read_toml
from gptfast.cli.train import SMALL_MODEL, SMALL_RUN, Train
from gptfast.config import FINETUNING_LR, to_toml
from gptfast.data.embedded import embedded_text
from gptfast.weights.checkpoint import checkpoints


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(embedded_text()[:1500], "utf-8")
    return path


def file(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(content, "utf-8")
    return path


# One field of every type.
EVERY_TYPE = """
n_layer = 3                     # an integer
lr = 1                          # a number, written as an integer
min_lr = 1e-5                   # a number or none
dropout = 0.25
max_steps = "none"              # an integer or none
epochs = 2
schedule = "wsd"                # one of some strings
keep_best = false               # true or false
freeze = ["wte.*", "h.0.*"]     # a list of strings
split = [0.8, 0.1, 0.1]         # a list of numbers
data = ["a.txt"]
tokenizer = "byte"              # a string or none
init = "none"
out = "runs/x"
"""


def test_every_type(tmp_path: Path) -> None:
    command = parse(["train", "--config", str(file(tmp_path, EVERY_TYPE))])
    model = dataclasses.replace(SMALL_MODEL, n_layer=3, dropout=0.25)
    run = dataclasses.replace(
        SMALL_RUN,
        lr=1.0,
        min_lr=1e-5,
        epochs=2,
        schedule="wsd",
        keep_best=False,
        freeze=("wte.*", "h.0.*"),
        out="runs/x",
    )
    assert dataclasses.replace(command, config=None) == Train(
        model, run, data=("a.txt",), tokenizer="byte", split=(0.8, 0.1, 0.1), init=None
    )
    assert type(command.train.lr) is float


BAD_FILES = {
    "n_layers = 3": "unknown key 'n_layers'; did you mean 'n_layer'?",
    "n-layer = 3": "unknown key 'n-layer'; did you mean 'n_layer'?",
    "wholly_unknown_thing = 3": "unknown key 'wholly_unknown_thing'",
    "[train]\nlr = 1e-3": "unknown key 'train'",
    "n_layer = 1.5": "n_layer must be an integer, got 1.5",
    "n_layer = true": "n_layer must be an integer, got True",
    'n_layer = "none"': "n_layer must be an integer, got 'none'",
    "n_layer = 0": "n_layer must be an integer from 1 to 10000, got 0",
    'lr = "fast"': "lr must be a number, got 'fast'",
    "lr = 1979-05-27": "lr must be a number, got datetime.date(1979, 5, 27)",
    f"lr = {10**400}": "lr must be a number below 2**63 in size, got 1000",
    f"max_steps = {2**63}": "max_steps must be an integer or none below 2**63 in size, got 922337",
    "lr = nan": "lr must be a finite number > 0, got nan",
    "keep_best = 1": "keep_best must be true or false, got 1",
    'schedule = "cos"': "schedule must be one of 'cosine', 'linear'",
    'freeze = "wte.*"': "freeze must be a list of strings, got 'wte.*'",
    "data = [1]": "data must be a list of strings, got [1]",
    'split = ["a"]': "split must be a list of numbers, got ['a']",
    "split = 0.9": "split must be a list of numbers, got 0.9",
    "out = {a = 1}": "out must be a string, got {'a': 1}",
    "max_steps = 3\nepochs = 2": "give max_steps or epochs, not both: got 3 and 2",
    "lr = ": "is not TOML: Invalid value",
    "lr = 1\nlr = 2": "is not TOML: Cannot overwrite a value",
    "this is prose": "is not TOML: Expected",
    f"data = {'[' * 5000}": "is not TOML: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: content[:30].replace("\n", ";"))
def test_bad_file(content: str, tmp_path: Path, capsys: Capture) -> None:
    path = file(tmp_path, content)
    refused(run(capsys, "train", "--config", path), str(path), BAD_FILES[content])


def test_no_suggestion_without_a_near_match(tmp_path: Path, capsys: Capture) -> None:
    path = file(tmp_path, "wholly_unknown_thing = 3")
    assert "did you mean" not in run(capsys, "train", "--config", path)[2]


def test_unreadable_file(tmp_path: Path, capsys: Capture) -> None:
    refused(run(capsys, "train", "--config", tmp_path / "no.toml"), "no.toml: No such file")
    refused(run(capsys, "train", "--config", tmp_path), "cannot read", "Is a directory")
    (tmp_path / "run.toml").write_bytes(b"out = '\xff'")
    refused(run(capsys, "train", "--config", tmp_path / "run.toml"), "is not UTF-8 text")
    refused(run(capsys, "train", "--config"), "--config")


def test_flags_overrule_the_file(text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    values = flat(Train()) | {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "max_steps": 9,
        "data": [str(text)],
        "tokenizer": "byte",
        "sample_tokens": 0,
        "out": str(tmp_path / "elsewhere"),
    }
    path = file(tmp_path, to_toml(values))
    done(capsys, "train", "--config", path, "--max-steps", 2, "--out", out, "--n-embd", 8)
    assert rows(out)[-1]["step"] == 2
    resolved = read_toml(checkpoints(out)[-1] / "train.toml")
    assert (resolved["n_embd"], resolved["n_head"], resolved["sample_tokens"]) == (8, 2, 0)
    assert not (tmp_path / "elsewhere").exists()


def tensors(out: Path) -> list[bytes]:
    """Return the bytes of the last checkpoint's safetensors."""
    last = checkpoints(out)[-1]
    return [(last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for 8 steps, saved every 4, with settings far from the defaults."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert main(["train", *options(text), "--out", str(out)]) == 0
    assert [path.name for path in checkpoints(out)] == ["step-00000004", "step-00000008"]
    return out


def options(text: Path) -> list[str]:
    settings = "--max-steps 8 --checkpoint-interval 4 --log-interval 1 --eval-interval 3 --seed 7 "
    settings += "--dropout 0.2 --lr 0.01 --min-lr 0.002 --warmup-steps 2 --schedule linear "
    settings += "--accumulation-steps 2 --freeze wpe.* --no-tie-weights --stride 5 --max-length 12 "
    settings += "--split 0.8 0.1 0.1 --beta2 0.9 --max-norm inf --no-keep-best"
    return [*TINY, "--data", str(text), *settings.split()]


def test_resume_needs_no_flag(straight: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run cut at step 4 and continued with --resume alone ends the same, bit for bit.

    A flag overrules the saved settings, and so does a file.
    """
    out = tmp_path / "out"
    done(capsys, "train", *options(text), "--out", out)
    lost = checkpoints(out)[-1].rename(tmp_path / "lost")
    output = done(capsys, "train", "--out", out, "--resume")
    assert f"resumed from {checkpoints(out)[0]} at step 4" in output
    assert tensors(out) == tensors(straight)
    assert [row["loss"] for row in rows(out)[1:]] == [row["loss"] for row in rows(straight)[1:]]
    assert (lost / "train.toml").read_text() == (checkpoints(out)[-1] / "train.toml").read_text()
    done(capsys, "train", "--out", out, "--resume", "--max-steps", 9)
    assert rows(out)[-1]["step"] == 9
    longer = file(tmp_path, f'max_steps = 11\nresume = true\nout = "{out}"')
    done(capsys, "train", "--config", longer, "--eval-batches", 1)
    assert rows(out)[-1]["step"] == 11
    resolved = read_toml(checkpoints(out)[-1] / "train.toml")
    assert (resolved["max_steps"], resolved["eval_batches"], resolved["seed"]) == (11, 1, 7)


def test_resume_of_nothing_starts(text: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ["--data", text, "--max-steps", 1, "--out", tmp_path, "--resume"]
    assert "resumed" not in done(capsys, "train", *TINY, *args)


def test_the_resolved_file_repeats_the_run(straight: Path, tmp_path: Path, capsys: Capture) -> None:
    resolved = checkpoints(straight)[-1] / "train.toml"
    out = tmp_path / "again"
    done(capsys, "train", "--config", resolved, "--out", out)
    assert tensors(out) == tensors(straight)
    ours, theirs = (read_toml(checkpoints(o)[-1] / "train.toml") for o in (out, straight))
    assert ours == theirs and "out" not in ours


def test_init_brings_architecture_and_tokenizer(
    straight: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """--init sets size and tokenizer, which are not named here, and the rate, nothing else."""
    done(capsys, "train", "--init", straight, "--data", text, "--out", tmp_path, "--max-steps", 1)
    ours, theirs = (read_toml(checkpoints(o)[-1] / "train.toml") for o in (tmp_path, straight))
    for name in (*get_type_hints(GPTConfig), "tokenizer"):
        assert ours[name] == theirs[name], name
    assert ours["n_embd"] == 16 and ours["tokenizer"] == "byte"
    assert (ours["lr"], ours["schedule"], ours["freeze"]) == (FINETUNING_LR, "cosine", [])
    assert rows(tmp_path)[0]["val_loss"] < rows(straight)[0]["val_loss"]
    # Where the weights came from is no setting, and stays on record when the run goes on.
    for steps in (1, 2):
        note = f"# This run started from the weights of {straight.name!r}: give them as --init"
        assert (checkpoints(tmp_path)[-1] / "train.toml").read_text().startswith(note)
        done(capsys, "train", "--resume", "--out", tmp_path, "--max-steps", steps + 1)


def test_init_from_a_file_and_none(straight: Path, tmp_path: Path) -> None:
    path = file(tmp_path, f'init = "{straight}"\nlr = 0.5')
    command = parse(["train", "--config", str(path)])
    assert (command.model.n_embd, command.train.lr, command.init) == (16, 0.5, str(straight))
    command = parse(["train", "--config", str(file(tmp_path, 'init = "none"'))])
    assert (command.model, command.init) == (SMALL_MODEL, None)


def test_resume_ignores_a_damaged_train_toml(straight: Path, tmp_path: Path) -> None:
    """The settings are those of the newest checkpoint that has them whole."""
    shutil.copytree(straight, tmp_path / "out", symlinks=True)
    before, last = checkpoints(tmp_path / "out")
    (last / "train.toml").write_text("n_layer = 99")
    assert parse(["train", "--resume", "--out", str(tmp_path / "out")]).model.n_layer == 1
    (before / "train.toml").write_text("n_layer = 99")
    assert parse(["train", "--resume", "--out", str(tmp_path / "out")]).model == SMALL_MODEL


def values_of(hint: Any) -> st.SearchStrategy:
    """Return a strategy for values of a field's type; its range refuses many of them."""
    if args := get_args(hint):
        if type(None) in args:
            return st.none() | values_of(args[0])
        if args[-1] is Ellipsis:
            return st.lists(values_of(args[0]), max_size=3).map(tuple)
        return st.sampled_from(args)
    return {
        int: st.integers(0, 12) | st.integers(),
        float: st.floats(0.0, 0.99) | st.floats(),
        bool: st.booleans(),
        str: st.text(),
    }[hint]


@st.composite
def configs(draw: st.DrawFn, cls: Any) -> Any:
    """Return a strategy for configurations in which a few fields have any valid value."""
    hints = get_type_hints(cls)
    names = draw(st.lists(st.sampled_from(sorted(hints)), unique=True, max_size=8))
    config = cls()
    for name in names:
        try:
            config = dataclasses.replace(config, **{name: draw(values_of(hints[name]))})
        except ValueError:
            pass
    return config


@given(model=configs(GPTConfig), run=configs(TrainConfig))
def test_toml_and_back(model: GPTConfig, run: TrainConfig) -> None:
    command = Train(model, run)
    text = to_toml(flat(command))
    assert apply(Train(), tomllib.loads(text), "here") == command


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
KEYS = st.sampled_from(sorted(flat(Train()))) | st.text()


@given(values=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_mapping_is_applied_or_a_value_error(values: dict[str, Any]) -> None:
    try:
        command = apply(Train(), values, "here")
    except ValueError as error:
        assert str(error).startswith("here: ")
        assert len(str(error).splitlines()) == 1
    else:
        for name, value in flat(command).items():
            given = values.get(name, value)
            converted = tuple(given) if isinstance(given, list) else given
            assert value == (None if converted == "none" and value is None else converted)


@given(
    text=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["lr", "=", "1", "[", "]", '"', "'''", "{", "\n", "a.b", ",", "#", "nan"]),
        max_size=20,
    ).map(" ".join)
)
def test_any_text_is_read_or_a_value_error(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, "utf-8")
    try:
        apply(Train(), read_toml(path), str(path))
    except ValueError as error:
        assert str(path) in str(error)


def test_apply_changes_nothing_it_was_given() -> None:
    command = Train()
    values: dict[str, Any] = {"freeze": ["wte.*"], "lr": 1}
    assert apply(command, values, "here").train.freeze == ("wte.*",)
    assert command == Train() and values == {"freeze": ["wte.*"], "lr": 1}


def test_a_moved_run_goes_on_where_it_lies(straight: Path, tmp_path: Path) -> None:
    """`out` is the directory in which the run was found, not that in which it was made."""
    shutil.copytree(straight, tmp_path / "moved", symlinks=True)
    command = parse(["train", "--resume", "--out", str(tmp_path / "moved")])
    assert command.train.out == str(tmp_path / "moved")


def test_one_limit_takes_the_place_of_the_other(straight: Path, tmp_path: Path) -> None:
    saved = ["--resume", "--out", str(straight)]
    assert parse(["train", *saved]).train.max_steps is not None
    for argv in (saved, ["--config", str(file(tmp_path, "max_steps = 4"))]):
        command = parse(["train", *argv, "--epochs", "3"])
        assert command.train.max_steps is None
    command = parse(["train", *saved, "--config", str(file(tmp_path, "epochs = 2"))])
    assert (command.train.max_steps, command.train.epochs) == (None, 2)


def test_the_default_runs_decay_is_for_its_own_rate(tmp_path: Path) -> None:
    assert parse(["train"]).train.min_lr == SMALL_RUN.min_lr
    assert parse(["train", "--lr", "5e-5"]).train.min_lr is None
    assert parse(["train", "--config", str(file(tmp_path, "lr = 5e-5"))]).train.min_lr is None
    both = file(tmp_path, "lr = 5e-5\nmin_lr = 1e-6")
    assert parse(["train", "--config", str(both)]).train.min_lr == 1e-6


def test_a_moved_run_has_its_own_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    """The default run keeps a vocabulary in its directory, which is found after a move."""
    sizes = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --device cpu".split()
    limits = ["--max-steps", 1, "--eval-batches", 1, "--sample-tokens", 0]
    done(capsys, "train", *sizes, *limits, "--out", tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    text = done(capsys, "generate", moved, "--prompt", "This is", "--max-new-tokens", 2)
    assert text.startswith("This is")
    done(capsys, "train", "--out", moved, "--resume", "--max-steps", 2)


def test_underscores_in_flags_but_not_in_values(capsys: Capture) -> None:
    """--n_layer means --n-layer, but a value that looks like a flag keeps its underscores."""
    assert parse(["train", "--n_layer", "3", "--sample_prompt=--a_b"]).model.n_layer == 3
    assert parse(["train", "--sample-prompt", "--my_flag is"]).train.sample_prompt == "--my_flag is"


def test_a_refused_run_writes_nothing(tmp_path: Path, text: Path, capsys: Capture) -> None:
    """A run on files keeps no vocabulary, and a refused start in its directory leaves none."""
    done(capsys, "train", *TINY, "--data", text, "--max-steps", 1, "--out", tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(run(capsys, "train", "--out", tmp_path), "already holds a run")
    assert sorted(path.name for path in tmp_path.iterdir()) == before

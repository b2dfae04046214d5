"""The data of `gptfast train`: found, checked, and made into batches."""

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from gptfast.config import TrainConfig
from gptfast.data import hub
from gptfast.data.loader import BatchOrder, create_dataloader
from gptfast.data.prepare import PARTS
from gptfast.data.sources import load_data
from gptfast.data.streams import is_stream
from gptfast.data.tokens import Source
from gptfast.files import LOCK_TIMEOUT_S, lock, new_files, write_files
from gptfast.tokenizer.bpe import Tokenizer, vocabulary
from gptfast.tokenizer.characters import CHARACTERS_JSON, CharacterTokenizer, characters_json
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights.checkpoint import checkpoints

if TYPE_CHECKING:
    from gptfast.cli.train import Train


def absolute(paths: Iterable[str]) -> tuple[str, ...]:
    """Return what --data names so that it means the same from another working directory."""

    def of(path: str) -> str:
        return hub.absolute(path) if hub.is_hub(path) else os.path.abspath(path)

    return tuple(path if path in ("", "-") else of(path) for path in paths)


def load_sources(command: "Train", tokenizer: Tokenizer) -> list[Source]:
    """Return the parts of a run's data. Raises ValueError as `load_data` does."""
    try:
        return load_data(command.data, tokenizer, command.split, **command.reading())
    except ValueError as error:
        files = [path for path in command.data if not hub.is_hub(path)]
        gone = [path for path in files if not (os.path.lexists(path) or glob.glob(path))]
        if command.resume and any(path != "-" for path in gone):
            raise ValueError(f"{error}; if this run's data has moved, name it (--data)") from None
        raise


def window(command: "Train") -> int:
    """Return how many tokens a window has. Raises ValueError if the model sees fewer."""
    block_size = command.model.block_size
    T = block_size if command.max_length is None else command.max_length
    if T > block_size:
        raise ValueError(f"max_length must be at most block_size={block_size}, got {T}")
    return T


def make_loaders(
    command: "Train", sources: Sequence[Source], tokenizer: Tokenizer
) -> list[DataLoader]:
    """Return a loader of each part. Batches of training data are no larger than the data."""
    found = []
    for name, source in zip(PARTS, sources, strict=False):
        try:
            found.append(_make_loader(command, source, tokenizer, training=name == PARTS[0]))
        except ValueError as error:
            if name == PARTS[0]:
                raise
            raise ValueError(
                f"the {name} part of the data: {error}; --split gives it a larger share"
            ) from None
    return found


def _make_loader(
    command: "Train", source: Source, tokenizer: Tokenizer, *, training: bool
) -> DataLoader:
    T = window(command)

    def loader(batch_size: int, drop_last: bool) -> DataLoader:
        return create_dataloader(
            source,
            batch_size,
            T,
            T if command.stride is None else command.stride,
            shuffle=training,
            drop_last=drop_last,
            seed=command.train.seed if training else 0,
            tokenizer=tokenizer,
        )

    every = loader(command.batch_size, drop_last=False)
    n = len(every.dataset)  # type: ignore[arg-type]
    return loader(min(command.batch_size, n), drop_last=True) if training else every


def batch_size_of(loader: DataLoader) -> int:
    """Return the number of items in a batch of a loader."""
    order = loader.batch_sampler
    assert isinstance(order, BatchOrder)
    return order.batch_size


def refuse_streams(data: Iterable[str], reader: str) -> None:
    """Raise ValueError for data that can be read only once. reader: what all read it, in words."""
    if once := [path for path in data if path == "-" or is_stream(Path(path))]:
        raise ValueError(
            f"{once[0]} can be read only once, but every {reader} reads the data; save it to a "
            "file and name that (--data)"
        )


def check_data(commands: Iterable["Train"]) -> None:
    """Raise ValueError for the first run whose data cannot be used.

    What several runs share is read once.
    """
    last, sources, tokenizer = None, list[Source](), None
    for command in commands:
        refuse_streams(command.data, "trial")
        if not command.data:  # the embedded text can always be used
            continue
        name = command.tokenizer_name()
        key = (command.data, command.split, name, *command.reading().values())
        if key != last or tokenizer is None:
            tokenizer = get_tokenizer(name)
            sources = load_sources(command, tokenizer)
            last = key
        make_loaders(command, sources, tokenizer)


def keep_characters(tokenizer: Tokenizer, out: str) -> Tokenizer:
    """Return a vocabulary of characters as it is kept in the run, where it moves along with it.

    Other tokenizers are returned as they are. Raises ValueError if the run has another one.
    """
    if not isinstance(tokenizer, CharacterTokenizer):
        return tokenizer
    directory = Path(out) / "tokenizer"
    with lock(Path(out), LOCK_TIMEOUT_S):
        if directory.is_dir():
            kept = get_tokenizer(str(directory))
            if vocabulary(kept) != vocabulary(tokenizer):
                raise ValueError(
                    f"{directory} has another vocabulary than the data ({tokenizer.name}); choose "
                    "another --out"
                )
            return kept
        if checkpoints(out):
            return tokenizer
        with new_files(directory) as part:
            write_files(part, {}, {CHARACTERS_JSON: characters_json(tokenizer)})
    return get_tokenizer(str(directory))


def with_known_prompt(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """Return the configuration with a prompt of samples that characters of the data can write.

    A prompt that was chosen stays: its error names the character.
    """
    default = TrainConfig.sample_prompt
    if not isinstance(tokenizer, CharacterTokenizer) or config.sample_prompt != default:
        return config
    known = "".join(c for c in default if c in tokenizer.characters) or tokenizer.characters[0]
    return dataclasses.replace(config, sample_prompt=known)

"""Token files, memory-mapped: llm.c's format, nanoGPT's and NumPy's, and shards of documents.

llm.c's file: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.
nanoGPT's file: the tokens alone, uint16 or wider (token_layout.py tells which). A shard of
documents has a sidecar `<shard>.idx`: for each document two little-endian int64, where it starts in
the shard and where its completion starts.
"""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptfast.data.token_layout import MAGIC, UINT16, VERSION, token_layout
from gptfast.files import replacing

# The header counts in int32.
MAX_FILE_TOKENS = 2**31 - 1


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError for shares that are not positive or do not sum to 1."""
    if not ratios or not min(ratios) > 0 or not abs(sum(ratios) - 1.0) <= 1e-6:
        given = " ".join(f"{ratio:g}" for ratio in ratios) or "none"
        raise ValueError(f"split ratios must be positive and sum to 1, got {given} (--split)")


def split_edges(n: int, ratios: Sequence[float], unit: str = "tokens") -> list[int]:
    """Return the edges [0, …, n] between consecutive parts of n things with these shares.

    Raises ValueError for shares that are not positive or do not sum to 1, and for an empty part.
    """
    check_ratios(ratios)
    # The last edge is n itself: a sum just below 1 would lose the end of a long text.
    edges = [*(round(n * sum(ratios[:i])) for i in range(len(ratios))), n]
    for start, stop, ratio in zip(edges, edges[1:], ratios, strict=False):
        if stop <= start:
            raise ValueError(
                f"the split of {n} {unit} at ratio {ratio} is empty; add text, or give "
                "it a larger share (--split)"
            )
    return edges


def file_header(count: int) -> bytes:
    """Return llm.c's header for `count` tokens. Raises ValueError for none or too many."""
    if not 1 <= count <= MAX_FILE_TOKENS:
        raise ValueError(f"a token file holds 1 to {MAX_FILE_TOKENS} tokens, got {count}; use more")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


def as_uint16(tokens: np.ndarray) -> np.ndarray:
    """Return (n,) ids as little-endian uint16. Raises ValueError for one outside 0..65535."""
    if tokens.dtype != np.uint16 and len(tokens):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > 65535:
            bad = low if low < 0 else high
            raise ValueError(f"token {bad} does not fit a token file, whose ids are 0 to 65535")
    return tokens.astype("<u2", copy=False)


def write_tokens(path: str | PathLike, tokens: Sequence[int] | np.ndarray | Tensor) -> None:
    """Write (n,) ids as one file in llm.c's format.

    Raises ValueError for ids outside 0..65535, no tokens, or more than 2^31 - 1.
    """
    ids = np.asarray(tokens)
    with replacing(Path(path), "wb") as file:
        file.write(file_header(len(ids)) + as_uint16(ids).tobytes())


def _map_tokens(path: Path) -> np.ndarray:
    try:
        layout = token_layout(path)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give token files") from None
    if hasattr(mmap, "MADV_RANDOM"):
        # Shuffled windows lie anywhere: read-ahead, megabytes on some disks, would be for nothing.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, layout.dtype, layout.count, layout.offset)


class TokenFiles:
    """The tokens of several files in sequence, read when they are asked for; slices are views.

    paths: one or more files of llm.c, nanoGPT or NumPy, which their content tells apart. start,
    stop: the range of tokens in this view. Pickling keeps these arguments, not the data.
    Raises ValueError for a file that cannot be read, is empty, or has the wrong size or type.
    """

    def __init__(
        self,
        paths: str | PathLike | Sequence[str | PathLike],
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        if isinstance(paths, str | PathLike):
            paths = [paths]
        if not paths:
            raise ValueError("no token files given; name at least one")
        self.paths = tuple(Path(path) for path in paths)
        self._maps = [_map_tokens(path) for path in self.paths]
        # Python's integers: the sum passes 2^31.
        self.edges = [0, *accumulate(len(tokens) for tokens in self._maps)]
        self.start, self.stop, _ = slice(start, stop).indices(self.edges[-1])

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, part: slice) -> "TokenFiles":
        if not isinstance(part, slice):
            raise TypeError(f"token files are sliced, tokens[a:b], got [{part!r}]")
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"token files are sliced in steps of 1, got {step}")
        view = object.__new__(TokenFiles)
        view.paths, view._maps, view.edges = self.paths, self._maps, self.edges
        view.start, view.stop = self.start + start, self.start + max(start, stop)
        return view

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _opened_again, (self.paths, self.start, self.stop, self.edges)

    def tensor(self) -> Tensor:
        """Return the view's tokens, (len,) int64, in memory."""
        parts, position, k = [], self.start, bisect_right(self.edges, self.start) - 1
        while position < self.stop:
            end = min(self.stop, self.edges[k + 1])
            parts.append(self._maps[k][position - self.edges[k] : end - self.edges[k]])
            position, k = end, k + 1
        ids = np.concatenate(parts) if parts else np.empty(0, "<u2")
        return torch.from_numpy(ids.astype(np.int64))

    def locate(self, i: int) -> tuple[Path, int]:
        """Return the file that has the view's token i, and the token's number in that file."""
        if not 0 <= i < len(self):
            raise IndexError(f"token {i} is out of range for {len(self)} tokens")
        k = bisect_right(self.edges, self.start + i) - 1
        return self.paths[k], self.start + i - self.edges[k]

    def unusual_types(self) -> dict[str, Path]:
        """Return the first file of each type of tokens but uint16, by the name of the type."""
        pairs = zip(self._maps, self.paths, strict=True)
        found = {tokens.dtype: path for tokens, path in reversed([*pairs])}
        return {str(dtype): path for dtype, path in found.items() if dtype != UINT16}


def _opened_again(paths: Sequence[Path], start: int, stop: int, edges: list[int]) -> TokenFiles:
    """Return a view that was pickled. Raises ValueError if a file has another length by now."""
    tokens = TokenFiles(paths, start, stop)
    for path, old, new in zip(paths, np.diff(edges), np.diff(tokens.edges), strict=True):
        if old != new:
            raise ValueError(
                f"{path} had {old} tokens when it was opened and has {new} now; leave token files "
                "as they are while they are used"
            )
    return tokens


def index_path(shard: Path) -> Path:
    """Return the path of a shard's sidecar."""
    return shard.with_suffix(".idx")


def read_index(shard: Path, n_tokens: int) -> np.ndarray:
    """Return where each document and its completion start in a shard: (documents, 2) int64.

    Raises ValueError if the sidecar is absent or does not fit the shard.
    """
    path = index_path(shard)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; prepare the data again") from None
    if content.startswith(b"MMIDIDX"):
        raise ValueError(
            f"{path} is Megatron's index, whose data cannot be read; prepare the text again"
        )
    if not content or len(content) % 16:
        raise ValueError(
            f"{path} has {len(content)} bytes, not 16 for each document; prepare the data again"
        )
    index = np.frombuffer(content, "<i8").reshape(-1, 2).astype(np.int64)
    starts, completions = index.T
    ends = np.append(starts[1:], n_tokens)
    # A document has at least its end-of-text, which belongs to the completion.
    wrong = (completions < starts) | (completions >= ends) | (ends > n_tokens)
    if starts[0] or wrong.any():
        raise ValueError(
            f"{path} does not fit {shard.name} and its {n_tokens} tokens: document "
            f"{int(wrong.argmax())} is out of order or out of range; prepare the data again"
        )
    return index


class Documents:
    """Prompts with completions, for fine-tuning: tokens, and where each document lies in them.

    tokens: (n,) int64 or TokenFiles. starts: (documents + 1,) int64, document i is tokens
    starts[i] to starts[i + 1]. completions: (documents,) int64, where its completion starts. Each
    document ends with end-of-text. first: the number of document 0 in the whole that this is a
    slice of. Slices are views; len() counts documents.
    """

    def __init__(
        self,
        tokens: Tensor | TokenFiles,
        starts: np.ndarray,
        completions: np.ndarray,
        first: int = 0,
    ) -> None:
        self.tokens, self.starts, self.completions = tokens, starts, completions
        self.first = first

    @classmethod
    def open(cls, paths: Sequence[str | PathLike]) -> "Documents":
        """Return the documents of shards with sidecars. Raises ValueError as `read_index` does."""
        tokens = TokenFiles(paths)
        sizes = np.diff(tokens.edges)
        shards = zip(tokens.paths, sizes.tolist(), tokens.edges, strict=False)
        index = np.concatenate([read_index(path, n) + start for path, n, start in shards])
        return cls(tokens, np.append(index[:, 0], tokens.edges[-1]), index[:, 1].copy())

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, part: slice) -> "Documents":
        if not isinstance(part, slice):
            raise TypeError(
                f"documents are sliced, documents[a:b], got [{part!r}]; see document(i)"
            )
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"documents are sliced in steps of 1, got {step}")
        stop = max(start, stop)
        starts, completions = self.starts[start : stop + 1], self.completions[start:stop]
        return Documents(self.tokens, starts, completions, self.first + start)

    def __reduce__(self) -> tuple[Callable, tuple]:
        if isinstance(self.tokens, TokenFiles):
            return _reopen, (self.tokens, self.first, self.first + len(self))
        return Documents, (self.tokens, self.starts, self.completions, self.first)

    def span(self) -> Tensor | TokenFiles:
        """Return all tokens of these documents, from the first to the last."""
        return self.tokens[int(self.starts[0]) : int(self.starts[-1])]

    def document(self, i: int, limit: int | None = None) -> tuple[Tensor, int]:
        """Return document i's first `limit` tokens, (n,) int64, and where its completion starts."""
        start, stop = int(self.starts[i]), int(self.starts[i + 1])
        if limit is not None:
            stop = min(stop, start + limit)
        tokens = self.tokens[start:stop]
        if isinstance(tokens, TokenFiles):
            tokens = tokens.tensor()
        return tokens, int(self.completions[i]) - start

    @property
    def eot(self) -> int:
        """The id of the end-of-text that ends each document."""
        tokens, _ = self.document(0)
        return int(tokens[-1])


def _reopen(tokens: TokenFiles, start: int, stop: int) -> Documents:
    return Documents.open(tokens.paths)[start:stop]


def open_tokens(paths: Sequence[str | PathLike]) -> TokenFiles | Documents:
    """Return token files as one source: Documents if all have a sidecar, TokenFiles if none has.

    Raises ValueError if only some have one.
    """
    files = [Path(path) for path in paths]
    plain = [path for path in files if not index_path(path).is_file()]
    if plain and len(plain) < len(files):
        raise ValueError(
            f"{plain[0]} has no {index_path(plain[0]).name} beside it, but other files have one; "
            "do not mix prompts and completions with plain text, or prepare the data again"
        )
    return TokenFiles(files) if plain or not files else Documents.open(files)

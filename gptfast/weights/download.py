"""`gptfast download`: GPT-2 from OpenAI's public address, or transformers' files, into the cache.

Files arrive in a hidden directory, and a transfer that was cut off continues where it ended. File
lengths, the hashes that are known here or sent by the server, and every tensor's CRC-32C are
checked before the directory gets its name.
"""

import base64
import contextlib
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from gptfast.config import PRESETS
from gptfast.files import cache_directory, publish
from gptfast.tokenizer.vocabulary import SHA256
from gptfast.weights import openai, transformers
from gptfast.weights.lazy_tensor import CheckpointError, read_json

OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/models"
_DIRECTORIES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
# Small files first, so that a wrong mirror is noticed early.
FILES = (
    "checkpoint",
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    "model.ckpt.index",
    "model.ckpt.meta",
    "model.ckpt.data-00000-of-00001",
)
_HUB_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
_CHUNK_BYTES = 2**20
_TIMEOUTS_S = (10, 60)  # to connect, and between two packets


class _Cut(Exception):
    """A transfer that ended early and may be continued."""


def download(
    name: str, *, url: str = OPENAI, attempts: int = 5, pause: float = 1.0, quiet: bool = False
) -> Path:
    """Fetch a GPT-2 into the cache directory, unless it is there, and return its directory.

    name: gpt2, gpt2-medium, gpt2-large or gpt2-xl. url: OpenAI's address, or a mirror's with the
    same directories. attempts: how often a file may be cut off without a new byte; the wait grows
    by `pause` seconds each time. After that, transformers' files are fetched by huggingface_hub, if
    it is installed. Proxies are taken from the environment. quiet: no progress bars.
    Raises ValueError for an unknown name, OSError for files that cannot be fetched or are damaged.
    """
    if name not in _DIRECTORIES:
        raise ValueError(f"there is no model {name!r}; choose from {', '.join(_DIRECTORIES)}")
    target = cache_directory() / name
    if target.is_dir():
        return target
    part = target.with_name(f".{name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{target.parent}, the directory of downloaded models, cannot be written "
            f"({error.strerror}); set GPTFAST_CACHE to one that can"
        ) from None
    try:
        for file in FILES:
            address = f"{url.rstrip('/')}/{_DIRECTORIES[name]}/{file}"
            _fetch(address, part / file, attempts, pause, quiet)
            _check_small(part / file, name)
        _check(part, name)
        publish(part, target)
    except (requests.RequestException, _Cut) as error:
        return _from_hub(name, target, f"{_reason(error)} ({url})")
    finally:
        _remove_empty(part)
    return target


def _remove_empty(part: Path) -> None:
    """Remove what a download leaves that got nothing; what it got is kept for the next one."""
    for file in part.glob("*.part"):
        if not file.stat().st_size:
            file.unlink()
    with contextlib.suppress(OSError):  # not empty, or not there
        part.rmdir()


def _check_small(path: Path, name: str) -> None:
    """Remove a small file and raise OSError if it is not the model's; an error page, say."""
    try:
        if path.name == "checkpoint" and b"model_checkpoint_path" not in path.read_bytes():
            raise CheckpointError("checkpoint has no model_checkpoint_path")
        if path.name == "hparams.json":
            hparams = read_json(path)
            wrong = [k for k, v in PRESETS[name].items() if hparams.get(k) != v]
            if wrong:
                raise CheckpointError(f"hparams.json is not {name}'s: {wrong[0]} differs")
    except CheckpointError as error:
        path.unlink()
        raise OSError(f"the download of {name} is damaged: {error}; try again") from None


def _reason(error: BaseException) -> str:
    return "no answer" if isinstance(error, requests.ConnectionError) else str(error)


def _fetch(address: str, path: Path, attempts: int, pause: float, quiet: bool) -> None:
    """Fetch a file, continuing one that is there in part, and check its hashes."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    left = attempts
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            md5 = _transfer(address, part, quiet)
            break
        except (_Cut, requests.ConnectionError, requests.Timeout) as error:
            gained = part.exists() and part.stat().st_size > before
            left = attempts if gained else left - 1
            if not left:
                raise _Cut(f"{path.name}: {_reason(error)}") from None
            time.sleep(pause * (attempts - left))
    if md5 and md5 != _digest(part, "md5").digest():
        part.unlink()
        raise OSError(f"{path.name} is damaged: its MD5 is not the server's; try again")
    expected = SHA256.get(path.name)
    if expected and _digest(part, "sha256").hexdigest() != expected:
        part.unlink()
        raise OSError(f"{path.name} is damaged: its SHA-256 is not {expected}; try again")
    part.replace(path)


def _digest(path: Path, kind: str) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind)


def _transfer(address: str, part: Path, quiet: bool) -> bytes | None:
    """Append the rest of a file to `part`; return the MD5 of all of it, if the server sends one.

    Raises _Cut if fewer bytes come than were announced.
    """
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(address, headers=headers, stream=True, timeout=_TIMEOUTS_S) as response:
        if response.status_code == 416:  # no rest: it is complete, or longer than the server's
            length = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
            if length and int(length[1]) == start:
                return None
            part.unlink()
            raise _Cut("the partial file here does not match the server's file")
        if response.status_code >= 500:
            raise _Cut(f"the server answered {response.status_code}")
        response.raise_for_status()
        if response.status_code != 206:
            start = 0  # the server sends all of it
        total = _total(response, start)
        _append(response, part, start, total, quiet)
        if total is not None and part.stat().st_size != total:
            size = part.stat().st_size
            if size > total:
                part.unlink()
            raise _Cut(f"received {size:,} of {total:,} bytes")
        # Content-MD5 is that of the range that was sent, Azure's own header that of the whole file.
        md5 = response.headers.get("x-ms-blob-content-md5") or (
            response.headers.get("Content-MD5") if start == 0 else None
        )
        return base64.b64decode(md5) if md5 else None


def _total(response: requests.Response, start: int) -> int | None:
    """Return the length of the whole file, if the server announces it."""
    if response.status_code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not span or int(span[1]) != start:
            raise OSError(f"the server did not send the bytes from {start} on; try another url")
        return int(span[2])
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _append(
    response: requests.Response, part: Path, start: int, total: int | None, quiet: bool
) -> None:
    name = part.name.removesuffix(".part")
    with (
        part.open("r+b" if start else "wb") as file,
        tqdm(
            total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=quiet
        ) as bar,
    ):
        file.seek(start)
        try:
            # Not iter_content, which loses the last part of a chunk that is cut off.
            while chunk := response.raw.read1(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError):
            raise _Cut(f"cut off after {file.tell():,} bytes") from None
        finally:
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _check(part: Path, name: str) -> None:
    """Read every tensor; if one is damaged, remove files without a known hash, raise OSError."""
    try:
        for tensor in openai.open_directory(part).tensors.values():
            tensor.read()
    except CheckpointError as error:
        for file in FILES:
            if file not in SHA256:
                (part / file).unlink(missing_ok=True)
        raise OSError(f"the download of {name} is damaged: {error}; try again") from None


def _from_hub(name: str, target: Path, why: str) -> Path:
    """Fetch a model in transformers' form by huggingface_hub, and return its directory.

    why: why OpenAI's form could not be downloaded, for the message of the OSError.
    """
    by_hand = (
        f"put the files {', '.join(FILES)} of GPT-2 {_DIRECTORIES[name]} into {target} by hand"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise OSError(
            f"{name} could not be downloaded: {why}; run the same command later to continue, "
            f"install huggingface_hub to try Hugging Face, or {by_hand}"
        ) from None
    part = target.with_name(f".{name}.hub")
    try:
        snapshot_download(
            f"openai-community/{name}", allow_patterns=list(_HUB_FILES), local_dir=part
        )
        config = transformers.open_directory(part).config
        if PRESETS[name].items() - vars(config).items():
            raise CheckpointError(f"the files are not {name}'s: the size of the model differs")
    except Exception as error:  # from any transport that huggingface_hub uses
        raise OSError(
            f"{name} could not be downloaded: {why}, nor from Hugging Face "
            f"({type(error).__name__}); run the same command later to continue, or {by_hand}"
        ) from None
    shutil.rmtree(part / ".cache", ignore_errors=True)
    publish(part, target)
    shutil.rmtree(target.with_name(f".{name}.part"), ignore_errors=True)
    return target

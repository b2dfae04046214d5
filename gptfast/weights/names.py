"""Tensors by their meaning: GPT's names for those of GPT-2, nanoGPT, the book and their wrappers.

A name in a file is a path. Wrappers of a model (torch.compile, data parallelism, PEFT, a trainer's
own module) add segments to it anywhere. What remains ends in a spelling that `_OUTER` or `_INNER`
knows, and what stands before that is the same for the whole model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor

_WRAPPERS = frozenset(
    "_module module _orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module "
    "_forward_module _ddp_module _dp_module model gpt2 gpt transformer base_model "
    "pretrained_model language_model".split()
)
_HEADS = ("lm_head", "out_head", "lm_head.decoder", "embed_out", "head", "output", "output_layer")
# GPT's names and their spellings: GPT-2's own, then those of the book and its variants.
_OUTER = {
    "wte.weight": ("wte.weight", "tok_emb.weight"),
    "wpe.weight": ("wpe.weight", "pos_emb.weight"),
    "ln_f.weight": ("ln_f.weight", "final_norm.scale", "final_norm.weight"),
    "ln_f.bias": ("ln_f.bias", "final_norm.shift", "final_norm.bias"),
    "lm_head.weight": tuple(f"{head}.weight" for head in _HEADS),
    "lm_head.bias": tuple(f"{head}.bias" for head in _HEADS),
}
_INNER = {
    "ln_1.weight": ("ln_1.weight", "norm1.scale", "norm1.weight", "ln1.weight"),
    "ln_1.bias": ("ln_1.bias", "norm1.shift", "norm1.bias", "ln1.bias"),
    "attn.c_attn.weight": ("attn.c_attn.weight", "att.qkv.weight"),
    "attn.c_attn.bias": ("attn.c_attn.bias", "att.qkv.bias"),
    "attn.c_proj.weight": ("attn.c_proj.weight", "att.out_proj.weight", "att.proj.weight"),
    "attn.c_proj.bias": ("attn.c_proj.bias", "att.out_proj.bias", "att.proj.bias"),
    "ln_2.weight": ("ln_2.weight", "norm2.scale", "norm2.weight", "ln2.weight"),
    "ln_2.bias": ("ln_2.bias", "norm2.shift", "norm2.bias", "ln2.bias"),
    "mlp.c_fc.weight": ("mlp.c_fc.weight", "ff.layers.0.weight"),
    "mlp.c_fc.bias": ("mlp.c_fc.bias", "ff.layers.0.bias"),
    "mlp.c_proj.weight": ("mlp.c_proj.weight", "ff.layers.2.weight"),
    "mlp.c_proj.bias": ("mlp.c_proj.bias", "ff.layers.2.bias"),
}
_OF_OUTER = {spelling: ours for ours, spellings in _OUTER.items() for spelling in spellings}
_OF_INNER = {spelling: ours for ours, spellings in _INNER.items() for spelling in spellings}
_BLOCK = re.compile(r"(?P<before>(?:.*?\.)?(?:h|trf_blocks|blocks)\.)(?P<i>\d{1,5})\.(?P<leaf>.+)")
# Query, key and value on their own, which c_attn has one under the other.
QKV = ("query", "key", "value")
_PART = re.compile(r"att\.W_(query|key|value)\.(weight|bias)")
# Masks and empty caches, which hold nothing that was learnt.
_BUFFERS = re.compile(r"attn?\.(bias|masked_bias|mask|cache_k|cache_v|ptr_current_pos)")
# Heads of other tasks: a value, a class, one of several answers.
_TASK_HEADS = re.compile(
    r"(.*\.)?(\w*head\w*|score|classifier|qa_outputs|summary|value|critic|reward\w*)\.\w[\w.]*"
)
# Architectures by names that only they have.
_FAMILIES = (
    (r"self_attn\.[qkv]_proj|mlp\.gate_proj|attention\.w[qkvo]\b", "Llama's or a kin of it"),
    (r"gpt_neox\.|attention\.query_key_value.*|embed_in\.weight", "GPT-NeoX's"),
    (r"attn\.attention\.[qkv]_proj", "GPT-Neo's"),
    (r"h\.\d+\.attn\.[qkv]_proj|h\.\d+\.mlp\.fc_in", "GPT-J's"),
    (r"attn\.qkv_proj", "CodeGen's"),
    (r"attention\.self\.(query|key|value)|embeddings\.word_embeddings", "BERT's or a kin of it"),
    (r"attention\.[qkv]_lin", "DistilBERT's"),
    (r"decoder\.embed_positions|decoder\.layers\.\d+\.self_attn", "OPT's or BART's"),
    (r"self_attention\.query_key_value|word_embeddings_layernorm", "BLOOM's or Falcon's"),
    (r"(Self|EncDec)Attention\.", "T5's"),
    (r"mixer\.(Wqkv|in_proj|A_log)", "Phi's or Mamba's"),
    (r"tokens_embed\.|positions_embed\.", "GPT-1's"),
    (r"attn\.c_[qkv]\.weight", "nanochat's"),
    (r"time_mix|time_mixing|att\.time_", "RWKV's"),
    (r"patch_embed|cls_token|vision_model", "a vision model's"),
    (r"crossattention\.|ln_cross_attn", "that of GPT-2 with cross-attention"),
)


@dataclass(frozen=True)
class Named:
    """Tensors in GPT's names, and what a message needs to speak of them as their file does."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """The file's name of each, by GPT's."""
    left: tuple[str, ...] = ()
    """The heads of other tasks, by the file's names."""
    raw: tuple[str, ...] = ()
    """All names in the file."""

    def file_name(self, name: str) -> str:
        """Return how the file names a parameter, or would if it had it."""
        return file_name(name, self.names)


def file_name(name: str, names: Mapping[str, str]) -> str:
    """Return how a file names a parameter of GPT, or would name it, after the names that it has."""
    if name in names:
        return names[name]
    block = re.fullmatch(r"h\.(\d+)\.(.+)", name)
    for ours, theirs in names.items():
        if block and re.fullmatch(rf"h\.\d+\.{re.escape(block[2])}", ours):
            number = r"((?:^|[./])(?:h|trf_blocks|blocks)\.?)\d+"
            return re.sub(number, rf"\g<1>{block[1]}", theirs, count=1)
    spellings = _INNER[block[2]] if block and block[2] in _INNER else _OUTER.get(name, (name,))
    for ours, theirs in names.items():
        if block and ours.startswith("h.") and (found := _BLOCK.fullmatch(theirs)):
            style = "trf_blocks." in theirs and len(spellings) > 1
            return f"{found['before']}{block[1]}.{spellings[int(style)]}"
        if not block and ours in _OUTER and theirs.endswith(_OUTER[ours]):
            spelling = max((s for s in _OUTER[ours] if theirs.endswith(s)), key=len)
            before, style = theirs.removesuffix(spelling), spelling != ours and len(spellings) > 1
            if name == "lm_head.weight":
                before = before.removesuffix("transformer.")
            return before + spellings[int(style)]
    return name


def family_of(raw: tuple[str, ...]) -> str | None:
    """Return whose architecture names of tensors belong to, in words; None if none is known."""
    for name in raw:
        for pattern, family in _FAMILIES:
            if re.search(pattern, name):
                return f"{family}, as {name!r} shows"
    return None


def unwrapped(name: str) -> str:
    """Return a tensor's name without the segments that wrappers of a model add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class _Read:
    """A name in a file, taken apart: what stands before, and GPT's name or what is left of it."""

    prefix: str
    ours: str | None
    part: tuple[str, str] | None = None
    """For a query, key or value on its own: which of them, and weight or bias."""
    buffer: bool = False


def _read(name: str) -> _Read:
    """Return what the name of a tensor means."""
    plain = unwrapped(name)
    if block := _BLOCK.fullmatch(plain):
        prefix = re.sub(r"(h|trf_blocks|blocks)\.$", "", block["before"])
        h, leaf = f"h.{int(block['i'])}.", block["leaf"]
        if leaf in _OF_INNER:
            return _Read(prefix, h + _OF_INNER[leaf])
        if part := _PART.fullmatch(leaf):
            return _Read(prefix, f"{h}attn.c_attn.{part[2]}", part=(part[1], part[2]))
        return _Read(prefix, None, buffer=_BUFFERS.fullmatch(leaf) is not None)
    for n in (3, 2):  # the longest spelling first
        spelling = ".".join(plain.split(".")[-n:])
        if spelling in _OF_OUTER:
            return _Read(plain.removesuffix(spelling), _OF_OUTER[spelling])
    return _Read("", None)


def gpt_names(source: str, raw: Mapping[str, LazyTensor]) -> Named:
    """Return the tensors of one model in GPT's names, wherever they stand in a file's names.

    Two names with one meaning must have the same values. Raises CheckpointError for that and for
    tensors that GPT-2 does not have.
    """
    read = {name: _read(name) for name in raw}
    if not any(what.ours for what in read.values()) and family_of(tuple(raw)) is None:
        if any(".lora_" in name for name in raw):
            raise CheckpointError(
                f"{source} is an adapter of peft: give the directory that has its "
                "adapter_config.json too"
            )
        some = ", ".join(map(repr, list(raw)[:3])) or "no tensors"
        raise CheckpointError(
            f"{source} has no tensor 'wte.weight', nor any of GPT-2's: {some:.300}"
        )
    prefix = _prefix(source, raw, read)
    found: dict[str, list[tuple[str, LazyTensor]]] = {}
    parts: dict[str, dict[str, str]] = {}
    left = []
    for name, tensor in raw.items():
        what = read[name]
        inside = what.prefix == prefix
        # The head stands beside the transformer or in it.
        head = (what.ours or "").startswith("lm_head.") and prefix.startswith(what.prefix)
        if what.ours is not None and (inside or head):
            if what.part is not None:
                parts.setdefault(what.ours, {})[what.part[0]] = name
            else:
                found.setdefault(what.ours, []).append((name, tensor))
        elif _TASK_HEADS.fullmatch(unwrapped(name)) and not _BLOCK.fullmatch(unwrapped(name)):
            left.append(name)
        elif not what.buffer:
            raise CheckpointError(_unknown(source, name, tuple(raw)))
    for ours, own in parts.items():
        found.setdefault(ours, []).append(_joined(source, raw, own))
    one = {ours: _one(source, ours, same) for ours, same in found.items()}
    tensors = {ours: tensor for ours, (_, tensor) in one.items()}
    names = {ours: name for ours, (name, _) in one.items()}
    return Named(_oriented(tensors), names, tuple(left), tuple(raw))


def _prefix(source: str, raw: Mapping[str, LazyTensor], read: Mapping[str, _Read]) -> str:
    """Return what stands before every name of the model; CheckpointError if there are several."""
    inner = [w.prefix for w in read.values() if w.ours and not w.ours.startswith("lm_head.")]
    embeddings = {w.prefix for w in read.values() if w.ours == "wte.weight"}
    prefixes = embeddings or set(inner)
    if len(prefixes) > 1 and "" not in prefixes:
        raise CheckpointError(
            f"{source} holds several models, under {', '.join(sorted(map(repr, prefixes)))}; save "
            "the state_dict of one of them alone"
        )
    return "" if len(prefixes) != 1 else prefixes.pop()


def _unknown(source: str, name: str, raw: tuple[str, ...]) -> str:
    """Return the message for a tensor that GPT-2 does not have."""
    if ".lora_" in name or ".base_layer." in name or ".modules_to_save." in name:
        return (
            f"{source} has an adapter of peft that is not merged, {name!r}; in peft, call "
            "merge_and_unload and save what it returns"
        )
    if family := family_of(raw):
        return f"{source} is another architecture: {family}"
    return f"{source} has a tensor the model does not know: {name!r}"


def _one(source: str, ours: str, same: list[tuple[str, LazyTensor]]) -> tuple[str, LazyTensor]:
    """Return the one tensor for a name; CheckpointError if several have other values."""
    (first, tensor), *others = same
    for name, other in others:
        if not equal(tensor, other):
            raise CheckpointError(
                f"{source}: two tensors stand for {ours!r}, {first!r} and {name!r}, and their "
                "values differ; delete one of them"
            )
    return first, tensor


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors have the same shape and values; reads them unless they are one."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.place is not None and a.place == b.place or torch.equal(a.read(), b.read())


def _joined(
    source: str, raw: Mapping[str, LazyTensor], own: Mapping[str, str]
) -> tuple[str, LazyTensor]:
    """Return one layer's query, key and value as c_attn has them: one under the other."""
    there = next(iter(own.values()))
    for part in QKV:
        if part not in own:
            missing = re.sub(r"W_(query|key|value)", f"W_{part}", there)
            raise CheckpointError(f"{source} has no tensor {missing!r}")
    parts = [raw[own[part]] for part in QKV]
    if len({(part.shape, part.dtype) for part in parts}) > 1 or not parts[0].shape:
        raise CheckpointError(f"{source}: the parts of {own['query']!r} differ in shape or dtype")
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return own["query"], LazyTensor(
        shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]), fresh=True
    )


# Conv1D keeps these four as (in, out), where nn.Linear has (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _oriented(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return matrices as (out, in). The orientation of c_attn tells how the file has them."""
    shapes = [t.shape for name, t in tensors.items() if name.endswith("attn.c_attn.weight")]
    if not shapes or len(shapes[0]) != 2 or shapes[0][0] >= shapes[0][1]:
        return tensors
    return {
        name: tensor.t() if name.endswith(CONV1D) and len(tensor.shape) == 2 else tensor
        for name, tensor in tensors.items()
    }

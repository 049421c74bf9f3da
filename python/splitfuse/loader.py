"""From what people have on disk, or a name, to a model: configuration, weights and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from . import _core
from ._core import CheckpointError, ConfigError
from ._progress import byte_bar, on_terminal
from .formats import Quantised, Scheme, native_format, scheme_of
from .gguf_blocks import INT4, INT8
from .live_model import LiveTensors, configuration
from .lora import Merged
from .models import Family, family_of
from .models.family import Fields
from .tensors import SafetensorFiles, Tensors, open_weights, untie_what_differs
from .tokenizer import Tokenizer, find_tokenizer, read_json

DEMO = "demo"
CHECKPOINT_FILE = "model.safetensors"
Progress = Callable[[int, int], None]
_DTYPES = ("F32", "F16", "BF16")
# Types of matrices that a format holds as they are.
_AS_STORED = {"dense": {*_DTYPES}, "int8": {"int8", *INT8}, "int4": {"int4", *INT4}}
_NAMED_AT_MOST = 5


@dataclass
class LoadedModel:
    """What an engine and its text layer need. `weights` reads the tensors when the engine asks for them,
    once.

    `generation_config`: what the model's makers suggest for sampling, as they wrote it. `kinds`: where matrices are
    quantised, how many of the linear layers are of which type. `quantize`: how they are held if nothing is said.
    `files`: those that the weights are read from.
    """

    config: _core.ModelConfig
    weights: _core.WeightSource
    name: str
    path: Path
    generation_config: dict[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    quantize: str = field(default="dense", kw_only=True)
    files: Sequence[Path] = field(default=(), kw_only=True)
    make_tokenizer: Callable[[], Tokenizer | None] = field(repr=False, kw_only=True)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Made when it is first used; None if the model came without one. Raises CheckpointError if it is
        damaged, ConfigError if it is of a kind that is not supported."""
        return self.make_tokenizer()

    def quantize_as(self, asked: str | None) -> str:
        """ "dense", "int8" or "int4": what `LLM`'s `quantize` comes to for this model."""
        if asked == "auto":
            return self.weights.format
        return self.quantize if asked is None else "dense" if asked == "none" else asked

    def is_fitted(self, quantize: str) -> bool:
        """Whether floats, or other integers, have to be fitted for matrices to be held as `quantize`."""
        as_stored = all(_is_as_stored(kind, quantize) for kind in self.kinds)
        return quantize != "dense" and not (self.kinds and as_stored)

    def matrices(self, quantize: str) -> str:
        """A line on what becomes of quantised matrices when they are held as `quantize`."""
        other = "dequantised" if quantize == "dense" else "fitted anew"
        parts = [
            f"{count} {kind} {'as stored' if _is_as_stored(kind, quantize) else other}"
            for kind, count in self.kinds.items()
        ]
        return f"matrices {quantize}: {', '.join(parts)}"

    def save(
        self,
        directory: str | Path,
        dtype: str | None = None,
        progress: Progress | None = None,
        quantize: str = "dense",
    ) -> None:
        """Writes the canonical checkpoint that load() and C++ open, and the tokenizer beside it. `quantize`: "int8"
        or "int4" writes the matrices as integers. `dtype`: of all else; None: bfloat16, or float32 beside integers,
        which costs little and changes no answer."""
        out = Path(directory)
        if (out / "config.json").exists():
            raise CheckpointError(f"{out}: holds another model; choose a new directory")
        out.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(out)
        text = json.dumps(self.generation_config, indent=2) + "\n"
        (out / "generation_config.json").write_text(text, encoding="utf-8")
        self.save_weights(out / CHECKPOINT_FILE, dtype, progress, quantize)

    def save_weights(
        self,
        file: Path,
        dtype: str | None = None,
        progress: Progress | None = None,
        quantize: str = "dense",
    ) -> None:
        """Writes what save() does, but `file`, with weights and configuration, alone."""
        dtype = dtype or ("bfloat16" if quantize == "dense" else "float32")
        _core.write_checkpoint(self.config, self.weights, dtype, str(file), progress, quantize)


def _is_as_stored(kind: str, quantize: str) -> bool:
    return kind in _AS_STORED[quantize] or kind.startswith(f"{quantize} (")


def load(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    show_progress: bool = True,
    lora: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Opens `model`; the weights are not read yet.

    `model`: a directory with Hugging Face files, what `splitfuse convert` wrote (directory or file), a .gguf
    file, a model's name on the Hugging Face hub, or "demo". `revision`: of a hub model. `lora`: the directory of a PEFT
    adapter that is merged into a model of Hugging Face files.

    Raises CheckpointError or ConfigError, in one line that names the file and what is wrong with it.
    """
    name = os.fspath(model)
    adapter = None if lora is None else Path(lora).expanduser()
    path = Path(name).expanduser()
    if adapter is not None and (name == DEMO or path.is_file()):
        raise ConfigError(f"{name}: a LoRA adapter can be merged into a model of Hugging Face files alone")
    if name == DEMO:
        return _load_demo(show_progress)
    if path.is_dir():
        return _load_directory(path, path.resolve().name, adapter)
    if path.is_file():
        return _load_file(path)
    from . import hub

    if not hub.is_repo_id(name):
        raise CheckpointError(
            f"{name}: no such file or directory, and not a name of the form OWNER/MODEL either"
        )
    return _load_directory(hub.snapshot(name, revision), name, adapter)


def _load_demo(show_progress: bool) -> LoadedModel:
    """A GGUF takes over a second to dequantise, so it is converted once, in float32, which keeps it exact."""
    from . import demo, hub

    converted = demo.folder() / "converted"
    path = demo.find()
    if path is not None:
        try:
            return _load_directory(path, DEMO)
        except (CheckpointError, ConfigError):  # written by another version, or damaged
            shutil.rmtree(converted, ignore_errors=True)
    path = demo.fetch(show_progress)
    if path.is_dir():
        return _load_directory(path, DEMO)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=demo.folder()) as work:
        new = Path(work) / "converted"
        with byte_bar("Converting", show_progress and on_terminal()) as progress:
            _load_gguf(path).save(new, "float32", progress)
        hub.install(new, converted)
        return _load_directory(converted, DEMO)


def _load_directory(path: Path, name: str, lora: Path | None = None) -> LoadedModel:
    if (path / "config.json").is_file():
        return _load_hugging_face(path, name, lora)
    if lora is not None:
        raise ConfigError(f"{path}: a LoRA adapter can be merged into a model of Hugging Face files alone")
    if (path / "model.safetensors").is_file():
        return _load_canonical(path / "model.safetensors", name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _load_gguf(ggufs[0])
    if ggufs:
        raise CheckpointError(f"{path}: holds {len(ggufs)} .gguf files; name one of them, such as {ggufs[0]}")
    raise CheckpointError(f"{path}: holds no model: expected config.json, model.safetensors or a .gguf file")


def _load_file(path: Path) -> LoadedModel:
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if path.suffix == ".safetensors":
        return _load_canonical(path, path.stem)
    raise CheckpointError(
        f"{path}: expected a .gguf file, a .safetensors file of `splitfuse convert`, or a directory"
    )


def _load_canonical(file: Path, name: str) -> LoadedModel:
    config, weights = _core.open_checkpoint(str(file))
    matrices = sum(
        name.startswith("layers.") and len(shape) == 2 for name, shape in _core.canonical_names(config)
    )
    return LoadedModel(
        config,
        weights,
        name,
        file.parent,
        _generation_config(file.parent),
        kinds={} if weights.format == "dense" else {weights.format: matrices},
        quantize=weights.format,
        files=[file],
        make_tokenizer=lambda: find_tokenizer(file.parent),
    )


def _load_gguf(path: Path) -> LoadedModel:
    from .gguf_file import GgufFile
    from .gguf_model import GgufModel

    file = GgufFile(path)
    model = GgufModel(file)

    def make_tokenizer() -> Tokenizer | None:
        from .gguf_tokenizer import read_tokenizer

        return read_tokenizer(file)

    kinds = model.kinds()
    return LoadedModel(
        model.config,
        model.weights(),
        path.stem,
        path,
        kinds={} if set(kinds) <= set(_DTYPES) else kinds,
        files=[path],
        make_tokenizer=make_tokenizer,
    )


def _load_hugging_face(path: Path, name: str, lora: Path | None) -> LoadedModel:
    raw = read_json(path / "config.json", "the model's configuration")
    fields = Fields(raw, str(path / "config.json"))
    family = family_of(raw, str(path / "config.json"))
    scheme = scheme_of(fields)
    config = family.read(fields)
    generation = _generation_config(path)
    _add_eos(config, generation, str(path / "generation_config.json"))
    config.validate()
    tensors, files = _open_tensors(path)
    weights, kinds = _open_weights(family, config, tensors, scheme, lora)
    return LoadedModel(
        config,
        weights,
        name,
        path,
        generation,
        kinds=kinds,
        quantize=weights.format,
        files=[path / "config.json", *files, *([] if lora is None else sorted(lora.glob("adapter_*")))],
        make_tokenizer=lambda: find_tokenizer(path),
    )


def _open_weights(
    family: Family, config: _core.ModelConfig, tensors: Tensors, scheme: Scheme | None, lora: Path | None
) -> tuple[_core.WeightSource, dict[str, int]]:
    """The weights, and how many of the quantised matrices are held how. An adapter needs them dequantised."""
    untie_what_differs(family, config, tensors)
    if scheme is None:
        merged = tensors if lora is None else Merged(tensors, lora, family, config)
        return open_weights(family, config, merged), {}
    quantised = Quantised(tensors, scheme)
    sources = family.sources(config, [listed.name for listed in quantised.listing()])
    quantised.forget_zero_biases({name for source in sources.values() for name in source.names})
    format = "dense" if lora is not None else native_format(family, config, quantised)
    kinds = {scheme.kind if format == "dense" else f"{format} ({scheme.kind})": quantised.count}
    if format == "dense":
        merged = quantised if lora is None else Merged(quantised, lora, family, config)
        return open_weights(family, config, merged), kinds
    return open_weights(family, config, quantised, quantised.read_integers, format), kinds


def _add_eos(config: _core.ModelConfig, generation: Mapping[str, Any], where: str) -> None:
    """Ids that end an answer are named in either file."""
    suggested = Fields(generation, where).eos_ids()
    config.eos_token_ids = list(dict.fromkeys([*suggested, *config.eos_token_ids]))


def load_live(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A transformers model in memory, as load() gives one from disk; `tokenizer`: of transformers."""
    raw = configuration(model)
    fields = Fields(raw, "the model's configuration")
    family = family_of(raw, "the model's configuration")
    config = family.read(fields)
    generation = getattr(model, "generation_config", None)
    advice = {} if generation is None else generation.to_diff_dict()
    _add_eos(config, advice, "the model's generation configuration")
    config.validate()
    tensors = LiveTensors(model)
    untie_what_differs(family, config, tensors)

    def make_tokenizer() -> Tokenizer | None:
        if tokenizer is None:
            return None
        with tempfile.TemporaryDirectory(prefix="splitfuse-") as folder:
            tokenizer.save_pretrained(folder)
            return find_tokenizer(Path(folder))

    return LoadedModel(
        config,
        open_weights(family, config, tensors),
        family.name,
        Path(getattr(model, "name_or_path", "") or family.name),
        advice,
        make_tokenizer=make_tokenizer,
    )


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_json(file, "the generation configuration") if file.is_file() else {}


def _open_tensors(path: Path) -> tuple[Tensors, Sequence[Path]]:
    """What the weight files hold, and these files."""
    if files := _files(path, "model.safetensors"):
        return SafetensorFiles(files, str(path)), files
    if files := _files(path, "pytorch_model.bin"):
        from .bin_file import BinFiles

        return BinFiles(files, str(path)), files
    raise CheckpointError(
        f"{path}: holds no weights: expected model.safetensors or pytorch_model.bin, or their index"
    )


def _files(path: Path, single: str) -> list[Path]:
    """The file called `single`, or the shards that its index names; none if there is neither."""
    if (path / single).is_file():
        return [path / single]
    index = path / f"{single}.index.json"
    if not index.is_file():
        return []
    placed = read_json(index, "the index of shards").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    shards = sorted({str(shard) for shard in placed.values()})
    for shard in shards:
        if PurePath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the shard {shard!r}; a shard lies in the same directory")
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        shown = ", ".join(missing[:_NAMED_AT_MOST])
        raise CheckpointError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {shown}")
    return [path / shard for shard in shards]

"""The settings of an export. They are checked when they are built, before any rank reads a byte."""

from __future__ import annotations

import dataclasses
import keyword
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_export.config.byte_sizes import MAX_NUMBER, parse_bytes
from dist_export.config.dense_settings import (
    check_dense_formats,
    check_drift,
    check_free_dims,
    check_layouts,
    check_output_names,
)
from dist_export.config.mistakes import FORMER_VALUES, Mistakes
from dist_export.config.publishing import resolve_export_dir
from dist_export.config.serving import read_serving
from dist_export.config.sparse_settings import CastDtype, check_sparse
from dist_export.config.trainer_deltas import check_trainer_delta
from dist_export.errors import ConfigError
from dist_export.formats.digests import missing_package

_SPEC = re.compile(r"[\w.]+:[\w.]+$")

MIN_MEMORY_BYTES = 64 << 20
"""The buffers and a useful number of ids need at least this."""

MAX_THREADS = 64

CheckpointFormat = Literal[
    "auto", "recis", "dcp", "safetensors", "torch", "dynamicemb", "dcp+dynamicemb", "tzrec_delta"
]


_MAX_SHARDS = 999_999
_MAX_TIMEOUT_SECS = 10_000_000
"""Four months. The functions that get a timeout cannot count much further."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Every setting of an export, in groups.

    ``--help``, ``launch/export.yaml`` and the page of settings are made from the text below each setting (see ``describe.py``).
    """

    # ---- Where from and where to ----
    ckpt_dir: str | None = None
    """The checkpoint to export: a directory, a file of torch.save or safetensors, an fsspec URL, or a registry's URI
    (models:/ctr/3, models:/ctr@champion). A training run with several checkpoints (ckpt_<step>, step-<n>, checkpoint-<n>) gives
    its latest complete one. Null with format: live."""
    export_dir: str = ""
    """Where the package goes: a directory, an fsspec URL, or a registry's URI (models:/ctr; registry_options say where that
    is)."""
    publish: str | None = None
    """A directory of versions, in place of export_dir: the package goes to <publish>/versions/<step>-<digest>, and once it is
    committed, <publish>/current.json names it. The same as export_dir: versions:<publish>."""
    keep_versions: int | None = None
    """How many versions stay in the directory of publish, besides the current one, the one before it, and those that were current
    less than ten minutes ago. Null keeps all."""
    base: str | None = None
    """A package to write a delta against: only rows that are new or changed since then, and which ids are gone (needs
    filter_sparse_opt). A directory, an fsspec URL, a registry's URI, or latest: the current version of the directory of publish.
    If it is a delta itself, see delta_chain. open_package reads a delta and all below it together."""
    delta_chain: int = 1
    """How many deltas may be on top of each other, at most 8. On a delta that has less below it goes the next one. Else, and with
    1 always, it goes on the full package at the bottom."""
    on_base_mismatch: Literal["error", "full"] = "error"
    """What to do if the base has other tables or slots, or cannot be read, or latest finds no version: error, or full, which
    exports everything and says why."""
    compare: Literal["fingerprints", "exact"] = "fingerprints"
    """How rows are compared with those of the base: by the row fingerprints in the base, where it has them; or exact, which reads
    the base's rows. Of rows that changed, fingerprints miss one in 2^64."""
    delta_ignore_slots: list[str] = field(default_factory=list)
    """Slots that are not compared with the base, such as step counters (needs compare: exact): a row that differs in nothing
    else is left to the base, with the base's values of these slots."""
    step: int | None = None
    """The training step to export from a run; null takes the latest complete checkpoint. A single checkpoint must be of this
    step."""
    register: str | None = None
    """A registry's URI, such as models:/ctr: the committed package becomes a new version there, by reference."""
    registry_options: dict[str, Any] = field(default_factory=dict)
    """Options for the registries of the three settings above. MLflow: registry_uri, and location, the directory below which
    packages of new versions go. Options under a scheme are for that registry only: {models: {location: /serving}, my: {root:
    /data}}."""
    format: CheckpointFormat | Literal["live"] = "auto"
    """Format of the checkpoint: recis, dcp (torch.distributed.checkpoint), safetensors, torch (torch.save) or dynamicemb. auto
    detects it from the files, and reads a DCP checkpoint together with the DynamicEmb dump beside it (dcp+dynamicemb). dcp or
    dynamicemb reads only that one. live: no checkpoint; the tables of the model (see model) are exported from memory.
    tzrec_delta: TorchEasyRec's dumps of looked-up embeddings, on top of a base."""
    since_step: int | None = None
    """With format: tzrec_delta, the step whose rows the base has: only dumps of later steps are taken. Null takes the step that
    the base's manifest says."""
    until_step: int | None = None
    """With format: tzrec_delta, the last step whose dump is taken. Null takes all."""
    allow_ragged: bool = False
    """With format: tzrec_delta, take a step also if files of some ranks are missing, as dumps by the clock may have it."""
    overwrite: bool = False
    """Replace a package that is already in export_dir. The old package stays readable until the new one is committed."""
    on_unfinished: Literal["resume", "restart", "error"] = "resume"
    """What to do if export_dir holds an unfinished export: resume it, restart from the beginning, or stop with an error."""
    follow_links: bool = False
    """Read files of the checkpoint that are links out of its directory, as in caches of downloads. False refuses them."""

    # ---- The tables ----
    filter_sparse_opt: bool | None = None
    """True drops optimizer state and writes new shards. False copies the sparse files byte for byte. Null is false for a RecIS
    checkpoint, as in RecIS, whose files can be served as they are, and true for every other format."""
    num_shards: int | Literal["world_size", "source"] | None = None
    """How many shards to write (needs filter_sparse_opt): a number, world_size (the same as null), or source."""
    treat_as_tables: list[str] = field(default_factory=list)
    """Patterns of further tensors that are tables, if the checkpoint does not say so. With model, its embeddings are tables
    anyway."""
    optimizer_slots: list[str] = field(default_factory=list)
    """Patterns of further slots and dense tensors that are optimizer state."""
    state_root: str | None = None
    """Which state to export, by its path, if the checkpoint has several (such as a model and its EMA). Null takes the model's.
    "." takes all states, with their full names."""
    drop_slots: list[str] = field(default_factory=list)
    """Patterns of further slots and dense tensors to drop, such as step_filter."""
    keep_slots: list[str] = field(default_factory=list)
    """Patterns of optimizer state to keep."""
    dtype: dict[str, CastDtype] | list[dict[str, CastDtype]] = field(default_factory=dict)
    """Dtypes of embeddings as {pattern of tables: dtype}, or a list of such mappings; the first match counts (needs
    filter_sparse_opt). A dtype is float16, bfloat16, float32, int8 (row-wise, with scale and bias), or source, which leaves the
    tables as they are."""
    on_overflow: Literal["error", "clamp"] = "error"
    """What to do with values that the dtype cannot hold, out of range or NaN. error fails the export. clamp writes the nearest
    value that fits, and 0 for NaN in int8; the manifest counts them."""
    on_misplaced: Literal["repair", "error"] = "repair"
    """What to do with rows outside the slice of their part. repair moves them (needs filter_sparse_opt). A copy always refuses
    them."""
    on_duplicate: Literal["error", "first", "last"] = "error"
    """What to do with an id that has several rows in a table: error, or keep the first or the last row, in the order of parts."""
    select_tables: list[str] = field(default_factory=list)
    """Patterns of the tables to export; none means all. Here and below, tables have the names of the checkpoint."""
    drop_tables: list[str] = field(default_factory=list)
    """Patterns of tables to leave out."""
    rename_tables: dict[str, str] = field(default_factory=dict)
    """New names of tables, as {pattern: name}. {0} and {1} in a name are the texts that the first and the second wildcard
    matched."""
    to_hash_tables: list[str] = field(default_factory=list)
    """Patterns of row-indexed tables to write as hash tables, with the row numbers as ids."""
    default_row: dict[str, Literal["zeros"] | list[float]] = field(default_factory=dict)
    """The row that serving uses for ids without a row, as {pattern: zeros} or {pattern: [0.5, ...]}."""
    dynamicemb_dims: dict[str, int] = field(default_factory=dict)
    """Dimensions of the tables of a DynamicEmb dump, as {pattern: dimension}. Its files do not state them. If a
    file's width differs, the export fails."""
    allow_hashed_ids: list[str] = field(default_factory=list)
    """Patterns of managed-collision tables (torchrec's MCH and HashZCH) whose module changes ids before the lookup, with an
    input_hash_func. The package has the changed ids, and serving must change ids in the same way."""
    allow_missing_tables: list[str] = field(default_factory=list)
    """Patterns of embeddings of the sparse arch that need not be in the checkpoint. Scores use the model's own rows of them."""
    prune: list[dict[str, Any]] = field(default_factory=list)
    """Rows to leave out, as a list of rules: {tables: "user_*", slot: step_filter, below: 10}, {tables: "*", norm_at_most: 0},
    {tables: item, deny: ids.npy} or {tables: item, allow: ids.txt}."""
    on_empty_table: Literal["error", "allow"] = "error"
    """What to do if the rules of prune leave no row of a table: error, or allow, which exports the table empty."""
    digest: Literal["xxh3", "sha256", "blake3", "none"] = "xxh3"
    """Digest of the package's files: xxh3, sha256 or blake3. none leaves the shards without one, and the kernel copies them;
    the package then cannot be the base of a delta."""
    server_side_copy: bool = True
    """Let an S3 store that has both source and target copy byte ranges itself. Their digest is then the SHA-256 that the store
    computes. False sends all bytes through the export, and the digest is that of the bytes that it reads."""
    row_index: bool = True
    """Write a row index for each part of a hash table, so that an id is found without reading the id column. It takes about 6
    bytes a row. False leaves it out, and then each lookup reads the ids."""
    row_fingerprints: Literal["auto"] | bool = "auto"
    """Write a fingerprint of each row, by which a later delta finds changed rows without reading this package's rows. It takes 8
    bytes a row, and the written rows are read back for it. auto writes them in full packages of a directory of versions (see
    publish) on a disk; true writes them everywhere; false leaves them out."""
    max_memory: int | str = "512MiB"
    """Memory that a rank may use for tables, beyond the interpreter with torch: bytes, or text such as 2GiB."""
    threads: int | None = None
    """Threads of a rank that read and write shards; null takes the cores of a rank, 4 at most."""
    need_export_sparse: bool = True
    """False exports only the dense arch. With base, the package is a delta over the base's tables as they are, of which no row is
    read: the dense inputs and outputs must be those of the base."""
    add_subfolder: bool = False
    """Put the package into <export_dir>/<yyyymmdd>000000/data, unless export_dir ends with data."""

    # ---- The dense arch ----
    model: str | None = None
    """package.module:callable that returns the model. Without it only the tables are exported."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for model."""
    sparse_model_name: str = "sparse_arch"
    """Path of the sparse arch within the model."""
    dense_model_name: str = "dense_arch"
    """Path of the dense arch within the model, and the prefix of its parameters in model.pt."""
    dataset: str | None = None
    """package.module:callable that returns an iterable of batches. A few are taken (see drift_batches)."""
    dataset_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for dataset."""
    allow_missing_dense: list[str] = field(default_factory=list)
    """Patterns of dense parameters that need not be in the checkpoint. The model's own values are exported. With the path of the
    sparse arch in front (sparse_arch.proj.*), patterns of what that has besides tables; with the path of a layer that is in
    neither arch, patterns of that."""
    allow_unexpected_dense: list[str] = field(default_factory=list)
    """Patterns of dense parameters that need not be in the dense arch. They are left out, as by RecIS."""
    allow_load_hooks: list[str] = field(default_factory=list)
    """Patterns of modules outside the dense arch whose own hooks or methods for loading a state_dict need not be run; model is
    the model itself. The checkpoint's own values are exported."""
    export_folder_name: str = "fx_user_model"
    """Folder of the dense arch within the package."""
    export_model_name: str = "user_model"
    """Name of the FX module within that folder."""
    export_outputs: list[str] | None = None
    """Names of the outputs, in order. Null takes the keys of a dict, or torch_output_<i>."""
    max_batch_size: int = 204800
    """The largest batch that serving may send."""
    dynamic_dims: dict[str, dict[int, str]] = field(default_factory=dict)
    """Further free dimensions, as {input: {dim: name}}."""
    device: str | None = None
    """Device to trace on. Null takes the device of the dense arch."""
    archive_format: Literal["pt2", "legacy"] = "pt2"
    """Layout of exported_model.pt: pt2 (torch 2.8 and later) or legacy (readable from torch 2.7 on)."""
    dense_formats: list[Literal["onnx", "aoti"]] = field(default_factory=list)
    """Further formats of the dense arch beside exported_model.pt. onnx writes model.onnx (extra [onnx]). aoti compiles
    model.pt2 for this machine's processor (needs g++). Each is compared with the model as the program is, with a tolerance of at
    least 1e-5."""
    layouts: list[Literal["triton"]] = field(default_factory=list)
    """Layouts of other servers for the dense arch. triton writes a Triton model repository (needs dense_formats: [onnx])."""
    atol: float = 1e-6
    """Absolute part of the tolerance between written program and model."""
    rtol: float = 1e-5
    """Relative part of the tolerance: of the value, or of the usual size in its column if that is larger."""
    drift_batches: int = 4
    """How many batches, at most, to compare the package with the unmodified model. 0 disables the comparison."""
    max_drift: float | dict[str, float] | None = None
    """Largest drift (max_abs) of any output, or by output. A larger drift fails the export. Null allows any."""

    score_program: Literal["auto", "require", "off"] = "auto"
    """Whether the package gets a score program, which scores from ids without the model's code: auto writes one if torch can
    export the sparse arch, and else a note says why not; require makes that an error; off writes none."""
    lookup_modules: list[str] = field(default_factory=list)
    """Patterns of modules of the sparse arch that are lookups as a whole: each holds one table and returns exactly the rows of
    its ids, whatever its code does (such as collectives). The score program has a lookup in their place."""
    serving: Literal["auto", "off"] | dict[str, Any] = "auto"
    """The serving contract in manifest.json, which says in data how ids become dense inputs: auto states what fg, mc, the
    configs of torchrec's collections and the model's own program tell; a mapping with features and inputs states what these do
    not tell; off states nothing. The contract is carried out on the sample; the export fails if it gives other scores."""

    # ---- The feature generator ----
    fg: str | None = None
    """package.module:callable that returns an object with get_fg_conf() and get_mc_conf()."""
    fg_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for fg."""
    fg_conf_or_path: str | dict[str, Any] | None = None
    """Feature generator configuration, or the path of its JSON file; exported as fg.json."""
    mc_conf_or_path: str | dict[str, Any] | None = None
    """Block configuration, or the path of its JSON file."""
    fg_rules: Literal["rtp", "none"] = "rtp"
    """Which limits the feature generator configuration must keep in addition to RecIS's own."""

    # ---- How ----
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Options for the file system of ckpt_dir and export_dir (fsspec)."""
    target_storage_options: dict[str, Any] | None = None
    """Options for the file system of export_dir, if they differ from those of ckpt_dir. Null takes storage_options."""
    events: bool | str = False
    """Write events as JSON lines to this file or fsspec URL. Lines are added. True takes <export_dir>.events.jsonl."""
    metrics: str | None = None
    """Write the figures of the export as Prometheus text to this file or fsspec URL, for a collector that reads files."""
    progress: bool = True
    """Show the progress of the export: in one line on a terminal, otherwise in lines of the log. From Python it also shows the
    closing summary."""
    timeout: float = 1800.0
    """Seconds without any progress after which a rank counts as hung, and the export ends."""

    def __post_init__(self) -> None:
        """Refuse settings that can be refused without reading a file. ConfigError names the setting."""
        mistakes = Mistakes()
        mistakes.collect(self._check_publish, None)
        if self.is_live:
            mistakes.collect(self._check_live, None)
        for check in (self._check_paths, self._check_engine, self._check_sparse, self._check_dense):
            mistakes.collect(check, None)
        mistakes.refuse()

    def _check_publish(self) -> None:
        names = "publish", "export_dir", "keep_versions", "register", "add_subfolder"
        export_dir = resolve_export_dir(**{name: getattr(self, name) for name in names})
        object.__setattr__(self, "export_dir", export_dir)
        object.__setattr__(self, "publish", None)  # from here on it is a registry like any other

    def _check_paths(self) -> None:
        for name in ("export_dir",) if self.is_live else ("ckpt_dir", "export_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set; give a directory or an fsspec URL")
            if re.search("[\0\ud800-\udfff]", getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; a path is UTF-8 without zero bytes")
        if self.state_root is not None and not self.state_root.strip():
            raise ConfigError(
                f"state_root is {self.state_root!r}; give a path such as ema, or null for the model's state"
            )
        if self.step is not None and self.step < 0:
            raise ConfigError(f"step is {self.step}; training steps count from 0")
        if isinstance(self.num_shards, int) and (isinstance(self.num_shards, bool) or self.num_shards < 1):
            raise ConfigError(f"num_shards is {self.num_shards}; give a number from 1 up, world_size or source")
        for name in ("model", "dataset", "fg"):
            spec = getattr(self, name)
            if spec is not None and not _SPEC.fullmatch(spec):
                raise ConfigError(f"{name} is {spec!r}; expected package.module:callable")
        if isinstance(self.num_shards, int) and self.num_shards > _MAX_SHARDS:
            raise ConfigError(f"num_shards is {self.num_shards:,}; RecIS's file names count up to {_MAX_SHARDS:,}")

    @property
    def is_live(self) -> bool:
        """Whether the tables are those of the model in the memory of the ranks."""
        return self.format == "live"

    def _check_live(self) -> None:
        if self.ckpt_dir is not None:
            raise ConfigError(
                f"format is live, which exports the model's own tables, but ckpt_dir is {self.ckpt_dir!r}; set ckpt_dir: null"
            )
        for name in ("treat_as_tables", "optimizer_slots", "state_root", "dynamicemb_dims"):
            if getattr(self, name):
                raise ConfigError(f"{name} is for checkpoints, but format is live: the model says what its tables are")
        if not self.filter_sparse_opt:  # there are no files to copy, so new shards are written in any case
            object.__setattr__(self, "filter_sparse_opt", True)

    @property
    def is_refresh(self) -> bool:
        """Whether the dense part is exported alone, over the tables of the base as they are."""
        return self.base is not None and not self.need_export_sparse

    @property
    def options_of_target(self) -> dict[str, Any]:
        """The options for the file system of ``export_dir``."""
        return self.storage_options if self.target_storage_options is None else self.target_storage_options

    @property
    def max_memory_bytes(self) -> int:
        """``max_memory`` in bytes."""
        return parse_bytes(self.max_memory, setting="max_memory")

    @property
    def dtypes(self) -> tuple[tuple[str, str], ...]:
        """``dtype`` as (pattern, dtype), in order."""
        entries = [self.dtype] if isinstance(self.dtype, dict) else self.dtype
        return tuple(item for entry in entries for item in entry.items())

    def _check_engine(self) -> None:
        if self.max_memory_bytes < MIN_MEMORY_BYTES:
            raise ConfigError(f"max_memory is {self.max_memory!r}; give {MIN_MEMORY_BYTES >> 20}MiB or more")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads is {self.threads}; give a number from 1 to {MAX_THREADS}, or null")
        if former := FORMER_VALUES.get(("digest", self.digest)):
            raise ConfigError(former)
        package = missing_package(self.digest)
        if package is not None:
            raise ConfigError(f"digest is {self.digest}, which needs the package {package}: pip install {package}")

    def _check_sparse(self) -> None:
        check_sparse(vars(self), self.dtypes)
        check_trainer_delta(vars(self))

    def _check_dense(self) -> None:
        for name in ("export_folder_name", "export_model_name"):
            value = getattr(self, name)
            if not value.isidentifier() or keyword.iskeyword(value) or value == "index":
                raise ConfigError(
                    f"{name} is {value!r}; it names a Python package beside the other files; give an identifier"
                )
        read_serving(self.serving)
        if self.lookup_modules and self.score_program == "off":
            raise ConfigError("lookup_modules are of the score program, but score_program is off")
        if self.export_folder_name == "score_program":
            raise ConfigError("export_folder_name is 'score_program', which is the folder of the score program")
        if self.max_batch_size < 2:
            raise ConfigError(
                f"max_batch_size is {self.max_batch_size}; a free batch dimension reaches from 1 to 2 at least"
            )
        if self.max_batch_size > MAX_NUMBER:
            raise ConfigError(f"max_batch_size is more than {MAX_NUMBER:,}; no batch is as large")
        if not 0 < self.timeout <= _MAX_TIMEOUT_SECS:
            raise ConfigError(f"timeout is {self.timeout}; give seconds above 0, {_MAX_TIMEOUT_SECS:,} at most")
        for name in ("atol", "rtol"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; give a finite number from 0 up")
        check_drift(self.drift_batches, self.max_drift)
        check_dense_formats(self.dense_formats)
        check_layouts(self.layouts, self.dense_formats)
        if self.export_outputs is not None:
            check_output_names(self.export_outputs)
        check_free_dims(self.dynamic_dims)

    def with_changes(self, **changes: Any) -> ExportConfig:
        """Return a copy with some settings changed, and check it."""
        return dataclasses.replace(self, **changes)

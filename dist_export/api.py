"""The Python API: ``Exporter`` with RecIS's parameters, ``export`` with a config, and ``compact``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.config.loader import load_config
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError
from dist_export.manifest import Manifest
from dist_export.model.user_objects import Objects
from dist_export.pipeline.compact_command import check_options
from dist_export.pipeline.compact_command import compact as compact_package
from dist_export.pipeline.config_agreement import build_and_digest
from dist_export.pipeline.run import run_export
from dist_export.reporting.display import show_lines
from dist_export.runtime.joining import join
from dist_export.runtime.ranks import Ranks


class Exporter:
    """Export a trained model; a drop-in for RecIS's ``recis.framework.Exporter``.

    The parameters are RecIS's. Further keywords are any other settings of
    :class:`~dist_export.config.schema.ExportConfig`, such as ``num_shards`` or ``allow_missing_dense``.

    Call :meth:`export` on all ranks of a running job, or in a single process. An existing process group is used through a
    separate subgroup. The model is not changed.
    """

    def __init__(
        self,
        model: Any,
        sparse_model_name: str,
        dense_model_name: str,
        dataset: Any,
        ckpt_dir: str | os.PathLike[str] | None,
        export_dir: str | os.PathLike[str],
        dense_optimizer: Any = None,
        export_folder_name: str = "fx_user_model",
        export_model_name: str = "user_model",
        export_outputs: list[str] | tuple[str, ...] | None = None,
        fg: Any = None,
        fg_conf_or_path: Any = None,
        mc_conf_or_path: Any = None,
        filter_sparse_opt: bool | None = None,
        add_subfolder: bool = False,
        need_export_sparse: bool = True,
        **settings: Any,
    ) -> None:
        """Check the settings. ConfigError (also a ValueError) names the wrong setting.

        Args:
            model: contains the sparse arch and the dense arch; None exports only the tables.
            sparse_model_name: path of the sparse arch within ``model``.
            dense_model_name: path of the dense arch within ``model``, and prefix of its parameters in ``model.pt``.
            dataset: an iterable of batches for the sparse arch; a few are taken. None, if ``ckpt_dir`` is None, exports only
                the tables.
            ckpt_dir: the checkpoint. None exports the tables of ``model`` from memory, without a checkpoint, with its dense
                parameters.
            export_dir: where the package is written.
            dense_optimizer: its gradients are cleared.
            export_folder_name: folder of the dense arch in the package.
            export_model_name: name of the FX module in that folder.
            export_outputs: names of the outputs, in order.
            fg: an object with ``get_fg_conf()`` and ``get_mc_conf()``.
            fg_conf_or_path: feature generator configuration, or the path of its JSON file; overrides ``fg``.
            mc_conf_or_path: the same for the blocks.
            filter_sparse_opt: True drops optimizer state and writes new shards, False copies the sparse files byte for byte. None
                is False for a RecIS checkpoint, as in RecIS, and True for every other format.
            add_subfolder: put the package into ``<yyyymmdd>000000/data`` below ``export_dir``.
            need_export_sparse: False exports only the dense arch; with ``base``, over the tables of the base as they are.
            settings: any other setting of an export.
        """
        self.config = load_config(
            {
                "sparse_model_name": sparse_model_name,
                "dense_model_name": dense_model_name,
                "ckpt_dir": None if ckpt_dir is None else os.fspath(ckpt_dir),
                "export_dir": os.fspath(export_dir),
                "export_folder_name": export_folder_name,
                "export_model_name": export_model_name,
                "export_outputs": None if export_outputs is None else list(export_outputs),
                "fg_conf_or_path": _plain(fg_conf_or_path),
                "mc_conf_or_path": _plain(mc_conf_or_path),
                "filter_sparse_opt": filter_sparse_opt,
                "add_subfolder": add_subfolder,
                "need_export_sparse": need_export_sparse,
                **settings,
            }
        )
        if model is not None and dataset is None and not (self.config.is_live and need_export_sparse):
            raise ConfigError("dataset is None; the dense arch is traced with one batch of it")
        if model is None and not need_export_sparse:
            raise ConfigError("need_export_sparse is False and model is None: nothing would be exported")
        self._objects = Objects(model, dataset, dense_optimizer, fg)

    def export(self, *, progress: bool | None = None) -> Manifest:
        """Export; return the manifest of the committed package. All ranks.

        Args:
            progress: whether rank 0 shows the progress and the closing summary: on a terminal in one line, elsewhere through
                the logger ``dist_export``. None takes the setting of that name, which is true by default.

        Raises:
            UserError: a mistake that the caller can correct; nothing was written. In a single process.
            ExportError: a failed export; no manifest was written. In a single process.
            StepFailedError: either of them on any of several ranks, with the text of each; its ``exit_code`` is 2 or 1.
        """
        with join(timeout_secs=self.config.timeout) as ranks:
            return _export(ranks, self.config, self._objects, progress)


def export(
    config: ExportConfig | Mapping[str, Any] | str | os.PathLike[str], *, progress: bool | None = None
) -> Manifest:
    """Export as the command line does, from a config object, a mapping, or the path of a YAML file. All ranks.

    Returns the manifest of the committed package; shows the progress and raises as :meth:`Exporter.export`.
    """
    # the types in a config that was built by hand have not been checked
    settings = load_config(vars(config) if isinstance(config, ExportConfig) else config)
    with join(timeout_secs=settings.timeout) as ranks:
        objects, digests = build_and_digest(ranks, settings)
        return _export(ranks, settings, objects, progress, digests)


def compact(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Manifest:
    """Make a full package of a delta package and its base, as the command ``compact`` does. All ranks.

    Returns the manifest of the committed package; shows the progress and raises as :meth:`Exporter.export`.

    Args:
        delta: the delta package: a directory, an fsspec URL, or a model registry's URI.
        out: where the full package is written; a URI such as ``versions:/serving/ctr`` publishes it.
        base: the base of the delta, as ``delta``. By default it is where it was when the delta was exported, or beside the delta.
        progress: as of :meth:`Exporter.export`.
        options: any other option of the command, such as ``num_shards`` or ``overwrite``.
    """
    below = None if base is None else os.fspath(base)
    arguments = {**check_options(options), "delta": os.fspath(delta), "out": os.fspath(out), "base": below}
    arguments["progress"] = is_shown = arguments["progress"] if progress is None else progress
    with join(timeout_secs=arguments["timeout"]) as ranks:
        return _show(ranks, compact_package(ranks, arguments), is_shown=is_shown)


def _export(
    ranks: Ranks,
    config: ExportConfig,
    objects: Objects,
    progress: bool | None,
    digests: Sequence[bytes] | None = None,
) -> Manifest:
    is_shown = config.progress if progress is None else progress
    return _show(ranks, run_export(ranks, config, objects, is_shown=is_shown, digests=digests), is_shown=is_shown)


def _show(ranks: Ranks, made: tuple[Manifest, list[str]], *, is_shown: bool) -> Manifest:
    manifest, summary = made
    if is_shown and ranks.rank == 0:
        show_lines(summary)
    return manifest


def _plain(conf_or_path: Any) -> Any:
    return os.fspath(conf_or_path) if isinstance(conf_or_path, os.PathLike) else conf_or_path

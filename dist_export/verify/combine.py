"""Report what all ranks found in the payload, and run the dense program. Rank 0."""

from __future__ import annotations

import msgspec
import numpy as np

from dist_export.checkpoint.recis.model_pt import load_dense_state
from dist_export.formats.recis import DENSE_STATE, DENSE_SUFFIX, EMBEDDING_SLOT, Slice, format_slice
from dist_export.humanize import count as say
from dist_export.humanize import few
from dist_export.manifest import DEFAULT_ROWS, MANIFEST, OUTPUTS, SAMPLE_ROWS, DenseEntry, ScoreEntry, ServingEntry
from dist_export.verify.base_dense import compare_taken_over, has_dense_of_base
from dist_export.verify.blocks import Blocks
from dist_export.verify.dense import check_dense
from dist_export.verify.finite import Odd
from dist_export.verify.ids import Duplicates, IdCounts
from dist_export.verify.metadata_checks import Survey
from dist_export.verify.score import check_scores, find_without_entry
from dist_export.verify.serving import check_serving

_SLICE_ELEMENTS = 1 << 20


def conclude(survey: Survey, counts: IdCounts, duplicates: list[Duplicates], odd: list[Odd]) -> None:
    """Add the findings about the payload to the report, and run the dense program."""
    if survey.blocks is not None:
        _tell_of_ids(survey, survey.blocks, counts, duplicates)
        if survey.is_finite_asked:
            _tell_of_values(survey, survey.blocks, odd)
    if survey.is_finite_asked and survey.package is None:
        survey.guard(DENSE_STATE, lambda: _check_dense_state(survey))
    if survey.package is not None and has_dense_of_base(survey.package.manifest):
        package = survey.package
        survey.guard(MANIFEST, lambda: compare_taken_over(package, survey.report))
        return
    if survey.manifest is not None and survey.manifest.dense is not None:
        entry = survey.manifest.dense
        survey.guard(entry.program, lambda: _check_dense(survey, entry))
    if survey.manifest is not None and survey.manifest.score is not msgspec.UNSET:
        score = survey.manifest.score
        survey.guard(score.program, lambda: _check_scores(survey, score))
    elif survey.manifest is not None and (path := find_without_entry(survey.manifest)):
        survey.report.add(
            MANIFEST, "score", f"lists {path}, but has no entry `score`, which an export writes with that file"
        )
    if survey.manifest is not None and survey.manifest.serving is not msgspec.UNSET:
        serving = survey.manifest.serving
        survey.guard(MANIFEST, lambda: _check_serving(survey, serving))


def _tell_of_ids(survey: Survey, blocks: Blocks, counts: IdCounts, duplicates: list[Duplicates]) -> None:
    report = survey.report
    before = report.count()
    for file, message in counts.errors:
        report.add(file, "ids", message)
    for column, (count, _, first) in counts.misplaced.items():
        row = int(survey.id_rows[column])
        part = Slice(*blocks.slices[blocks.slice[row]].tolist())
        report.add(
            blocks.file_of(row),
            "slice",
            f"{count:,} ids of {blocks.key(row)!r} lie outside its slice {format_slice(part)}, first {first}; RecIS drops "
            "such rows without a word when it loads on several ranks",
        )
    tables, positions = np.unique(blocks.table[survey.id_rows], return_index=True)
    file_of_table = {
        table: blocks.file_of(int(survey.id_rows[place]))
        for table, place in zip(tables.tolist(), positions.tolist(), strict=True)
    }
    for table, rows, first in duplicates:
        report.add(
            file_of_table[table],
            "unique",
            f"{rows:,} ids of table {blocks.tables[table]!r} stand twice, first {first}",
        )
    gpu_keys = np.flatnonzero(counts.gpu_keys)
    if len(gpu_keys) and survey.manifest is None:
        row = int(survey.id_rows[gpu_keys[0]])
        report.note(
            blocks.file_of(row),
            "gpu_keys",
            f"{int(counts.gpu_keys.sum()):,} ids are -1 or -2, first in {blocks.key(row)!r}; a table of RecIS 1.0 on a GPU "
            "cannot hold them",
        )
    if not counts.errors:
        known = {found.table for found in duplicates}
        known |= set(blocks.table[survey.id_rows[list(counts.misplaced)]].tolist())
        _compare_sums(survey, blocks, counts, file_of_table, known)
    if report.count() == before and blocks.is_whole:
        total = int(blocks.rows[survey.id_rows].sum())
        all_there = "all there, unique" if survey.manifest is not None else "unique"
        by_number = np.flatnonzero(blocks.is_row_indexed & blocks.is_slot(EMBEDDING_SLOT))
        num_row_indexed = len(np.unique(blocks.table[by_number]))
        if num_row_indexed < len(blocks.tables) or not num_row_indexed:
            tables_and_rows = f"{say(len(blocks.tables) - num_row_indexed, 'table')}, {say(total, 'row')}"
            report.checked.append(f"{tables_and_rows}: {all_there}, each in the slice of its shard")
        if num_row_indexed and not report.count():
            rows_by_number = say(int(blocks.rows[by_number].sum()), "row")
            report.checked.append(
                f"{say(num_row_indexed, 'table')} by row number, {rows_by_number}: all there, in order"
            )
        if survey.manifest is not None and (older := survey.manifest.list_older_slots()):
            report.checked.append(f"{few(older)}: rows that a delta did not compare have the values of its base")


def _compare_sums(
    survey: Survey, blocks: Blocks, counts: IdCounts, file_of_table: dict[int, str], known: set[int]
) -> None:
    if survey.manifest is None or not blocks.is_whole:
        return
    numbers = {name: number for number, name in enumerate(blocks.tables)}
    for table in survey.manifest.tables:
        number = numbers.get(table.name)
        if number is None or number in known:
            continue
        id_sum = f"{int(counts.id_sum[number]):016x}"
        if id_sum != table.id_sum:
            survey.report.add(
                file_of_table.get(number, MANIFEST),
                "id_sum",
                f"the ids of table {table.name!r} are not those that were exported (sum {id_sum}, not {table.id_sum})",
            )


def _tell_of_values(survey: Survey, blocks: Blocks, odd: list[Odd]) -> None:
    by_slot: dict[tuple[str, str], list[Odd]] = {}
    for found in odd:
        row = int(survey.value_rows[found.block])
        if found.error:
            survey.report.add(blocks.file_of(row), "finite", f"{blocks.key(row)!r} cannot be read: {found.error}")
            continue
        name = blocks.stems[blocks.stem[row]] if blocks.stem[row] >= 0 else ("", blocks.key(row))
        by_slot.setdefault(name, []).append(found)
    for (table, slot), its in by_slot.items():
        row = int(survey.value_rows[its[0].block])
        width = int(np.prod(blocks.shape(row)[1:], dtype=np.int64)) or 1
        what = f"slot {slot!r} of table {table!r}" if table else f"dense tensor {slot.removesuffix(DENSE_SUFFIX)!r}"
        nans, infs = sum(found.nans for found in its), sum(found.infs for found in its)
        survey.report.add(
            blocks.file_of(row),
            "finite",
            f"{what} holds {nans:,} NaN and {infs:,} infinities, first in {blocks.key(row)!r} row {its[0].first // width}",
        )
    if not odd:
        num_bytes = int((blocks.end - blocks.begin)[survey.value_rows].sum())
        survey.report.checked.append(f"{len(survey.value_rows):,} blocks of floats, {num_bytes:,} bytes: all finite")


def _check_dense_state(survey: Survey) -> None:
    """Find values in model.pt that are not finite. Tensors are read slice by slice, because the file may be mapped and large."""
    if survey.directory.exists(DENSE_STATE) and not any(f.file == DENSE_STATE for f in survey.report.found):
        import torch

        for name, tensor in load_dense_state(survey.directory).items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            flat = tensor.reshape(-1)
            pieces = [flat[first : first + _SLICE_ELEMENTS] for first in range(0, len(flat), _SLICE_ELEMENTS)]
            nans = sum(int(piece.isnan().sum()) for piece in pieces)
            infs = sum(int(piece.isinf().sum()) for piece in pieces)
            if nans or infs:
                survey.report.add(DENSE_STATE, "finite", f"{name!r} holds {nans:,} NaN and {infs:,} infinities")


def _check_scores(survey: Survey, entry: ScoreEntry) -> None:
    assert survey.package is not None
    assert survey.manifest is not None
    listed = {file.path for file in survey.manifest.files}
    missing = [name for name in (entry.program, entry.sample) if name not in listed]
    for name in missing:
        survey.report.add(MANIFEST, "score", f"score: {name} is not among the files")
    if missing or survey.report.count():
        return  # a damaged table would be reported a second time
    lines: list[str] = []
    try:
        check_scores(survey.package, entry, lines, survey.report.checked)
    finally:
        survey.report.add_lines("score", lines)


def _check_serving(survey: Survey, serving: ServingEntry) -> None:
    assert survey.package is not None
    assert survey.manifest is not None
    dense, score = survey.manifest.dense, survey.manifest.score
    if survey.report.count():
        return  # what is wrong with tables, samples or programs is told already
    lines: list[str] = []
    if dense is None:
        lines.append(f"{MANIFEST}: has an entry `serving`, but no dense arch")
    else:
        sample = None if score is msgspec.UNSET else score
        check_serving(survey.package, serving, dense, sample, lines, survey.report.checked)
    survey.report.add_lines("serving", lines)


def _check_dense(survey: Survey, entry: DenseEntry) -> None:
    assert survey.package is not None
    assert survey.manifest is not None
    needed = [
        entry.program,
        *(
            f"{entry.folder}/{name}"
            for name in ("output_info.json", "params_order.json", SAMPLE_ROWS, DEFAULT_ROWS, OUTPUTS)
        ),
    ]
    listed = {file.path for file in survey.manifest.files}
    missing = [name for name in needed if name not in listed]
    if missing:
        survey.report.add(missing[0], "dense", "not among the files of the manifest, so nothing vouches for it")
        return
    if any(path == entry.program or path.startswith(f"{entry.folder}/") for path in survey.bad):
        return  # already reported
    lines: list[str] = []
    try:
        # do not report rows of damaged tables a second time
        check_dense(survey.package, entry, lines, survey.report.checked, looks_up_rows=not survey.report.count())
    finally:
        survey.report.add_lines("dense", lines)

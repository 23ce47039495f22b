"""Planning for any tables, parts, slices, shard counts, ranks, threads and dropped rows: everything has one place.

The plan is made from metadata that no file backs; where rows belong is worked out here anew, one by one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_export.checkpoint.metadata import Blocks, Checkpoint, DenseTensor, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.formats.id_list import IdList
from dist_export.formats.safetensors import decode_header
from dist_export.formats.tuning import Tuning
from dist_export.plan.census import Census
from dist_export.plan.dropped_rows import DroppedRows, account_for, count_kept, drop_nothing
from dist_export.plan.plan import SparsePlan
from dist_export.plan.prune import Pruning, TableRule, match_rules
from dist_export.plan.selection import Selection
from dist_export.plan.shard_layout import plan_shards
from dist_export.plan.target_slices import plan_targets
from dist_export.plan.work_units import assign, plan_units
from tests.support.properties import examples

PROPERTY = examples(120)
FLOAT, LONG = CODE_BY_TORCH["float32"], CODE_BY_TORCH["int64"]


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    """A checkpoint as metadata, the ids and dropped rows of each part, and how to export it."""
    size = draw(st.sampled_from([1, 7, 16, 65536]))
    tables, parts, ids, dropped, denied, pruned = [], [], [], [], [], []
    for table in range(draw(st.integers(1, 3))):
        num_slots = draw(st.integers(2, 4))
        inner = [
            (),
            *draw(st.lists(st.sampled_from([(1,), (3,), (0,)]), min_size=num_slots - 1, max_size=num_slots - 1)),
        ]
        slots = tuple(
            SlotMeta(
                name=("id", "embedding", "s2", "s3")[column],
                dtype=FLOAT if column else LONG,
                inner_shape=inner[column],
                row_bytes=4 * inner[column][0] if column else 8,
                column=column,
            )
            for column in range(num_slots)
        )
        tables.append(TableMeta(name=f"t{table}", slots=slots))
        denied.append(draw(st.sets(st.integers(-40, 40), max_size=20)))
        edges = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
        for begin, end in sorted(draw(st.lists(edges, min_size=1, max_size=4))):
            one_part = draw(st.lists(st.integers(-40, 40), max_size=12))  # in or out of the slice, unique or not
            parts.append((table, begin, end, size, len(one_part)))
            ids.append(np.array(one_part, np.int64))
            pruned.append([row for row, one_id in enumerate(one_part) if one_id in denied[table]])
            listed = draw(st.sets(st.integers(0, len(one_part) - 1))) if one_part else set()
            dropped.append(sorted(listed - set(pruned[-1])))
    return SimpleNamespace(
        tables=tuple(tables),
        parts=parts,
        ids=ids,
        dropped=dropped,
        denied=denied,
        pruned=pruned,
        has_dense=draw(st.booleans()),
        num_shards=draw(st.one_of(st.none(), st.integers(1, min(size, 5)))),
        workers=draw(st.integers(1, 6)) * draw(st.integers(1, 4)),
        granule=draw(st.sampled_from([1, 3, 1 << 20])),
        chunk=draw(st.sampled_from([8, 64, 1 << 20])),
        unit=draw(st.sampled_from([1, 4])),
        num_files=draw(st.integers(1, 3)),
    )


def build_checkpoint(case: SimpleNamespace) -> Checkpoint:
    """Lay the blocks out one behind the other in a few files, with gaps for what is not of our tables."""
    num_slots = max(len(table.slots) for table in case.tables)
    file = np.full((len(case.parts), num_slots), -1, np.int32)
    offset = np.zeros((len(case.parts), num_slots), np.int64)
    key = np.full((len(case.parts), num_slots), None, object)
    ends = [100] * case.num_files
    for number, (table, *_, rows) in enumerate(case.parts):
        for slot in case.tables[table].slots:
            its_file = (number + slot.column) % case.num_files
            file[number, slot.column], offset[number, slot.column] = its_file, ends[its_file]
            key[number, slot.column] = f"{number}.{slot.name}"
            ends[its_file] += rows * slot.row_bytes
    dense = ()
    if case.has_dense:
        dense = (DenseTensor(name="w", dtype=FLOAT, shape=(2,), file=0, offset=ends[0], num_bytes=8),)
        ends[0] += 8
    columns = np.array(case.parts, np.int64).T
    return Checkpoint(
        format="none",
        directory=SimpleNamespace(url="nowhere"),
        files=tuple(SourceFile(name=str(i), size=end, version="") for i, end in enumerate(ends)),
        tables=case.tables,
        parts=Parts(table=columns[0], begin=columns[1], end=columns[2], size=columns[3], rows=columns[4]),
        blocks=Blocks(file=file, offset=offset, key=key),
        dense=dense,
        fingerprint="",
        copy_hindrances=(),
        verbatim={},
        warnings=(),
    )


def owner_of(one_id: int, own: tuple[int, int, int], slices: Any) -> int:
    """The rule: a row stays in its part's own slice where that is a target, else the first slice that holds it."""
    place = (one_id % (1 << 64)) % own[2]
    holders = [number for number, (begin, end, _) in enumerate(slices) if begin <= place < end]
    mine = [number for number in holders if tuple(slices[number]) == own]
    return (mine or holders)[0]


def rules_of(case: SimpleNamespace) -> Pruning:
    """A deny list for each table, where it has one."""
    lists = [IdList(np.array(sorted(ids), np.int64)) for ids in case.denied]
    return Pruning(rules=tuple((TableRule("deny_list", None, 0, its),) if len(its) else () for its in lists))


def build_plan(case: SimpleNamespace) -> tuple[SparsePlan, dict[tuple[int, int], int]]:
    """Return the plan, and the target of each row that is kept."""
    checkpoint = build_checkpoint(case)
    targets = plan_targets(checkpoint, case.num_shards)
    counts: dict[tuple[int, int, int], int] = {}
    home: dict[tuple[int, int], int] = {}
    for part, (table, begin, end, size, _) in enumerate(case.parts):
        for row, one_id in enumerate(case.ids[part].tolist()):
            if row in case.pruned[part]:
                continue
            target = owner_of(one_id, (begin, end, size), targets[table].slices)
            run = (part, row // case.granule, target)
            counts[run] = counts.get(run, 0) + 1
            if row not in case.dropped[part]:
                home[part, row] = target
    runs = np.array([(*run, rows) for run, rows in sorted(counts.items())], np.int64).reshape(-1, 4).T
    everyone = np.arange(len(case.parts))
    census = Census(
        part=runs[0],
        granule=runs[1],
        target=runs[2],
        rows=runs[3],
        counted=everyone,
        misplaced=np.zeros_like(everyone),
        id_sum=np.zeros(len(everyone), np.uint64),
        granule_rows=case.granule,
    )
    places = [(part, row) for part, rows in enumerate(case.dropped) for row in rows]
    columns = np.array(places, np.int64).reshape(-1, 2).T
    dropped = DroppedRows(
        part=columns[0],
        row=columns[1],
        id=np.array([case.ids[part][row] for part, row in places], np.int64),
        reason=np.zeros(len(places), np.uint8),
    )
    selection = Selection(
        kept=tuple(table.slots for table in case.tables),
        dropped=tuple(() for _ in case.tables),
        kept_dense=checkpoint.dense,
        dropped_dense=(),
    )
    plan = plan_shards(
        checkpoint,
        selection,
        targets,
        census,
        num_shards=case.num_shards,
        dropped=dropped,
        pruning=rules_of(case),
    )
    return plan, home


def lay_bytes(plan: SparsePlan, case: SimpleNamespace) -> list[np.ndarray]:
    """Carry the plan out on addresses instead of bytes: for each byte of each output where in the source it came from.

    -1 where nothing was written, -2 for the header; a byte that is written twice fails.
    """
    space = 1 << 32
    outputs = [np.full(file.num_bytes, -1, np.int64) for file in plan.files]

    def write(file: int, begin: int, addresses: Any) -> None:
        assert begin + len(addresses) <= len(outputs[file])
        assert (outputs[file][begin : begin + len(addresses)] == -1).all(), "a byte is written twice"
        outputs[file][begin : begin + len(addresses)] = addresses

    def read(file: int, begin: int, num_bytes: int) -> np.ndarray:
        assert 0 <= begin <= begin + num_bytes <= plan.checkpoint.files[file].size, "a range outside its file"
        return file * space + np.arange(begin, begin + num_bytes)

    for number, file in enumerate(plan.files):
        write(number, 0, np.full(len(file.header), -2))
    copies = plan.copies
    for row in range(len(copies)):
        addresses = read(int(copies.source_file[row]), int(copies.source_offset[row]), int(copies.num_bytes[row]))
        write(int(copies.file[row]), int(copies.offset[row]), addresses)
    for gather in plan.gathers:
        table = int(plan.checkpoint.parts.table[gather.part])
        next_row = dict(zip(gather.targets.tolist(), gather.first_target_rows.tolist(), strict=True))
        dropped = set(plan.dropped.rows_in(gather.part, gather.first_row, gather.num_rows).tolist())
        its_ids = case.ids[gather.part][gather.first_row : gather.first_row + gather.num_rows]
        rules = plan.pruning.rules[table] if plan.pruning else ()
        dropped |= set(np.flatnonzero(match_rules(rules, its_ids, {})).tolist())
        _, begin, end, size, _ = case.parts[gather.part]
        for number in range(gather.num_rows):
            row = gather.first_row + number
            target = owner_of(int(case.ids[gather.part][row]), (begin, end, size), plan.targets[table].slices)
            if number in dropped:
                continue
            for slot in plan.slots_of(table):
                block = plan.blocks_of(table, slot.column)[target]
                source = int(plan.checkpoint.blocks.offset[gather.part, slot.column]) + row * slot.row_bytes
                addresses = read(int(plan.checkpoint.blocks.file[gather.part, slot.column]), source, slot.row_bytes)
                position = int(plan.blocks.offset[block]) + next_row[target] * slot.row_bytes
                write(int(plan.blocks.file[block]), position, addresses)
            next_row[target] += 1
        ends = dict(zip(gather.targets.tolist(), (gather.first_target_rows + gather.counts).tolist(), strict=True))
        assert next_row == ends, "the counts of a gather are not those of its rows"
    return outputs


@PROPERTY
@given(cases())
def test_every_kept_row_has_one_place_and_no_dropped_row_has_any(case: SimpleNamespace) -> None:
    """Ranges and gathers cover each output once; each row is where the slices say, with all its slots."""
    plan, home = build_plan(case)
    outputs = lay_bytes(plan, case)
    for output in outputs:
        assert (output != -1).all(), "a byte of the output is not written"
    parts, source = plan.checkpoint.parts, plan.checkpoint.blocks
    address_of = {}
    for part, row in home:
        for slot in plan.slots_of(int(parts.table[part])):
            begin = int(source.offset[part, slot.column]) + row * slot.row_bytes
            file = int(source.file[part, slot.column])
            address_of[part, row, slot.column] = [(file << 32) + begin + byte for byte in range(slot.row_bytes)]
    row_at = {addresses[0]: (part, row) for (part, row, column), addresses in address_of.items() if column == 0}
    found: dict[tuple[int, int], int] = {}
    for table in range(len(case.tables)):
        for target, id_block in enumerate(plan.blocks_of(table, 0).tolist()):
            begin, file = int(plan.blocks.offset[id_block]), int(plan.blocks.file[id_block])
            for number in range(int(plan.blocks.rows[id_block])):
                place = row_at[int(outputs[file][begin + number * 8])]  # KeyError: the id of a dropped row, or of none
                assert place not in found, "a row stands twice"
                found[place] = target
                for slot in plan.slots_of(table):
                    block = plan.blocks_of(table, slot.column)[target]
                    first = int(plan.blocks.offset[block]) + number * slot.row_bytes
                    held = outputs[int(plan.blocks.file[block])][first : first + slot.row_bytes].tolist()
                    assert held == address_of[(*place, slot.column)], "a slot is not that of its id"
    assert found == home


@PROPERTY
@given(cases())
def test_headers_say_where_the_blocks_are(case: SimpleNamespace) -> None:
    """Offsets, shapes and sizes in the headers are those of the plan, and leave no gap."""
    plan, _ = build_plan(case)
    seen = 0
    for number, file in enumerate(plan.files):
        header = decode_header(file.header[8:], path=file.name, file_size=file.num_bytes)
        place = {key: i for i, key in enumerate(header.keys)}
        for block in np.flatnonzero(plan.blocks.file == number).tolist():
            seen += 1
            at = place.pop(plan.blocks.key[block])
            slot = case.tables[int(plan.blocks.table[block])].slots[int(plan.blocks.column[block])]
            assert header.begins[at] == plan.blocks.offset[block]
            assert header.shapes[at] == (int(plan.blocks.rows[block]), *slot.inner_shape)
        assert set(place) == ({"w^ "} if case.has_dense and number == 0 else set())
    assert seen == len(plan.blocks.key)


@PROPERTY
@given(cases())
def test_every_unit_is_in_one_queue_and_the_units_are_the_output(case: SimpleNamespace) -> None:
    """Whatever the ranks and threads; hashed ranges cover each file once, and what is written is what is planned."""
    plan, _ = build_plan(case)
    tuning = Tuning(chunk_bytes=case.chunk, unit_bytes=case.unit * case.chunk)
    writing, hashing = plan_units(plan, tuning=tuning)
    queues = assign(writing, case.workers)
    assert len(queues) == case.workers
    assert [unit for queue in queues for unit in queue] == list(range(len(writing)))
    assert sum(unit.num_bytes for unit in writing) == plan.num_bytes
    cover = [np.zeros(file.num_bytes, np.int8) for file in plan.files]
    for unit in (*writing, *hashing):
        if unit.is_hashed:
            cover[unit.number][unit.begin : unit.end] += 1
    assert all((column == 1).all() for column in cover)
    gathered = [number for unit in writing if unit.kind == "gather" for number in range(unit.begin, unit.end)]
    assert gathered == list(range(len(plan.gathers)))


@PROPERTY
@given(cases())
def test_a_part_is_gathered_only_where_its_rows_part_ways_or_some_are_dropped(case: SimpleNamespace) -> None:
    """What goes over whole stays a byte range, whatever is dropped elsewhere."""
    plan, home = build_plan(case)
    for part, dropped in enumerate(case.dropped):
        targets = {target for (its_part, _), target in home.items() if its_part == part}
        is_gathered = any(gather.part == part for gather in plan.gathers)
        is_cut = bool(dropped) or bool(case.pruned[part])
        assert is_gathered == (len(targets) > 1 or (bool(targets) and is_cut))


@PROPERTY
@given(cases())
def test_the_account_of_dropped_rows_adds_up(case: SimpleNamespace) -> None:
    """Rows, misplaced rows and ids by table, against a count one by one; and what is kept is the rest."""
    plan, home = build_plan(case)
    for table in range(len(case.tables)):
        account = account_for(plan.checkpoint, plan.dropped, table, pruned=None, pruning=None)
        mine = [
            (int(case.ids[part][row]), case.parts[part][1:4])
            for part, rows in enumerate(case.dropped)
            for row in rows
            if case.parts[part][0] == table
        ]
        assert account.rows == len(mine)
        assert account.rows_by_reason == ({"duplicate": len(mine)} if mine else {})
        strangers = [one_id for one_id, (begin, end, size) in mine if not begin <= (one_id % (1 << 64)) % size < end]
        assert account.misplaced == len(strangers)
        rows_out = int(plan.blocks.rows[plan.blocks_of(table, 0)].sum())
        assert rows_out == sum(case.parts[part][0] == table for part, _ in home)


@PROPERTY
@given(cases(), st.data())
def test_the_digest_tells_apart_which_rows_are_dropped(case: SimpleNamespace, data: st.DataObject) -> None:
    """Two ranks that would leave other rows behind disagree, also where headers and counts are the same."""
    plan, _ = build_plan(case)
    full = [part for part, ids in enumerate(case.ids) if len(ids) > len(case.pruned[part])]
    if not full:
        return
    part = data.draw(st.sampled_from(full))
    row = data.draw(st.sampled_from(sorted(set(range(len(case.ids[part]))) - set(case.pruned[part]))))
    dropped = set(case.dropped[part]) ^ {row}
    if data.draw(st.booleans()) and case.dropped[part]:  # as many rows, others
        dropped -= {data.draw(st.sampled_from(case.dropped[part]))}
    case.dropped[part], before = sorted(dropped), case.dropped[part]
    other, _ = build_plan(case)
    assert (other.digest == plan.digest) == (case.dropped[part] == before)


@PROPERTY
@given(cases())
def test_the_digest_tells_apart_the_rules(case: SimpleNamespace) -> None:
    """Also where they leave the same rows behind."""
    plan, _ = build_plan(case)
    case.denied[0] ^= {1000}
    other, _ = build_plan(case)
    assert plan.digest != other.digest


def test_without_dropped_rows_the_census_is_left_alone() -> None:
    census = SimpleNamespace()
    assert count_kept(None, (), census, drop_nothing()) is census  # type: ignore[arg-type]

"""Prune rules and default rows are decided a second time from the settings: each is broken, and the export must see it."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_export.commit import publish
from dist_export.dense.row_check import match_name
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.rule_check import is_pruned
from dist_export.errors import ParityError
from dist_export.formats import row_encodings
from dist_export.formats.id_list import IdList
from dist_export.pipeline import planning
from dist_export.plan import dropped_rows, prune
from dist_export.plan import table_view as plan_tables
from dist_export.plan.prune import TableRule
from dist_export.transfer import prune_filter as transfer_pruning
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.recis_writer import Raw, split_table, write_checkpoint

LIMIT = 10
UNKNOWN = 999_999_999


def write_source(folder: Path, *, twice: bool = False) -> Path:
    """``step`` is 0, 1, 2 ... by id, ``weight`` is the same as bfloat16 from behind; the first user's row is zeros."""
    tables = {}
    for number, (name, rows) in enumerate({"user_emb": 60, "item_emb": 40}.items()):
        rng = np.random.default_rng(number)
        ids = np.arange(1, rows + 1, dtype=np.int64) * 1001
        embedding = rng.normal(size=(rows, 4)).astype(np.float32)
        embedding[0] = 0
        step = np.arange(rows, dtype=np.int64)
        weight = Raw("BF16", (step[::-1].astype(np.float32).view(np.uint32) >> 16).astype("<u2").reshape(rows, 1))
        slots = {"embedding": embedding, "step": step, "weight": weight}
        if twice and name == "user_emb":
            ids[-1] = ids[5]
            ids[-2] = ids[5]
        parts = split_table(ids, {**slots, "weight": weight.array}, 2, 65536)
        tables[name] = [replace(p, slots={**p.slots, "weight": Raw("BF16", p.slots["weight"])}) for p in parts]
    write_checkpoint(folder / "ckpt", tables, model_state=tiny_model.trained_dense_state())
    return folder / "ckpt"


def batch() -> dict[str, torch.Tensor]:
    users = [1001 * (i + 1) for i in range(20)] + [UNKNOWN]
    items = [1001 * (i + 1) for i in range(20)] + [UNKNOWN]
    return {"user": torch.tensor(users), "item": torch.tensor(items), "price": torch.linspace(0, 1, 21)[:, None]}


def export(folder: Path, *, twice: bool = False, **settings):
    if "prune" in settings:
        settings["on_empty_table"] = "allow"
    return exports.exporter(
        tiny_model.build_model(), "sparse_arch", "dense_arch", [batch()], write_source(folder, twice=twice),
        folder / "out", filter_sparse_opt=True, **settings,
    ).export()  # fmt: skip


def break_matching(patch) -> None:
    """A rule is for the table behind the one that it names."""
    real = prune.fnmatchcase
    other = {"user_emb": "item_emb", "item_emb": "user_emb"}
    patch.setattr(prune, "fnmatchcase", lambda name, pattern: real(other[name], pattern))


def break_below(patch) -> None:
    real = prune._is_below
    patch.setattr(prune, "_is_below", lambda values, limit: real(values, limit + 1))


def break_at_most(patch) -> None:
    """``<`` for ``<=``, where the norm is the bound itself."""
    real = prune._is_short
    patch.setattr(prune, "_is_short", lambda values, limit: real(values, limit) & (values != 0).any(axis=1))


def break_column(patch) -> None:
    real = prune._find_slot
    patch.setattr(prune, "_find_slot", lambda name, *more: real({"step": "weight", "weight": "step"}[name], *more))


def prune_none(patch) -> None:
    patch.setattr(TableRule, "applies", lambda self, ids, rows: np.zeros(len(ids), bool))


def prune_all(patch) -> None:
    patch.setattr(TableRule, "applies", lambda self, ids, rows: np.ones(len(ids), bool))


def break_lists(patch) -> None:
    """Every list lacks its last id."""
    real = planning.read_id_list
    patch.setattr(IdList, "contains", lambda self, ids: np.isin(ids, self.ids[:-1]))
    patch.setattr(planning, "read_id_list", real)


def forget_rules(patch) -> None:
    patch.setattr(
        planning, "plan_pruning", lambda checkpoint, *_: prune.Pruning(rules=tuple(() for _ in checkpoint.tables))
    )


def break_order(patch) -> None:
    real = dropped_rows.drop_duplicates
    swapped = {"first": "last", "last": "first"}
    patch.setattr(planning, "drop_duplicates", lambda *args, keep: real(*args, keep=swapped[keep]))


def widen_lookups(patch) -> None:
    """The shards are right, and the sample is told of other rows."""
    patch.setattr(
        transfer_pruning.PruneReader, "is_pruned", lambda self, part, rows, ids: np.arange(len(rows)) % 2 == 0
    )


def take_the_other_default(patch) -> None:
    real = plan_tables.first_match
    patch.setattr(plan_tables, "first_match", lambda *args: real(*args)[::-1])


def ignore_defaults(patch) -> None:
    patch.setattr(plan_tables, "_as_default", lambda asked, own: own)


def zero_defaults(patch) -> None:
    patch.setattr(plan_tables, "_as_default", lambda asked, own: None if asked is None else "zeros")


def zeros_in_the_sample(patch) -> None:
    real = RowFinder.default_row
    patch.setattr(RowFinder, "default_row", lambda self, table: np.zeros_like(real(self, table)))


def cast_twice(patch) -> None:
    real = row_encodings.encode_values

    def encode(values, dtype, encoding=""):
        return real(torch.tensor(values).bfloat16().double().tolist(), dtype, encoding)

    patch.setattr("dist_export.dense.row_lookup.encode_values", encode)


def scale_defaults(patch) -> None:
    real = row_encodings.encode_values
    patch.setattr(
        "dist_export.dense.row_lookup.encode_values", lambda values, *more: real([v * 1.02 for v in values], *more)
    )


def state_another(patch) -> None:
    """The manifest alone is wrong."""
    real = publish.TableEntry

    def entry(**fields):
        row = fields["default_row"]
        return real(**{**fields, "default_row": row[::-1] if isinstance(row, tuple) else row})

    patch.setattr(publish, "TableEntry", entry)


STEP = {"prune": [{"tables": "user_*", "slot": "step", "below": LIMIT}]}
WEIGHT = {"prune": [{"tables": ["user_emb"], "slot": "weight", "below": 45}]}
ZEROS = {"prune": [{"tables": "*", "norm_at_most": 0}]}
DEFAULT = {"default_row": {"user_*": [0.1, -0.7, 2.3, 1.0], "*": "zeros"}}
DECISION = r"the id \d+ of the sample is (exported|left behind), but by the rules of prune it is (exported|left behind)"
STATED = "the default row in the manifest is .*, but default_row makes it"
SAMPLED = "ids without a row had another row in the sample than default_row gives"
BROKEN = {
    "rule of another table": (break_matching, STEP, DECISION),
    "one below the bound": (break_below, STEP, DECISION),
    "one below the bound, floats": (break_below, WEIGHT, DECISION),
    "less for at most": (break_at_most, ZEROS, DECISION),
    "another slot": (break_column, STEP, DECISION),
    "another slot, floats": (break_column, WEIGHT, DECISION),
    "none": (prune_none, STEP, DECISION),
    "none, by norm": (prune_none, ZEROS, DECISION),
    "all": (prune_all, STEP, DECISION),
    "deny": (break_lists, {"prune": [{"tables": "user_emb", "deny": "LIST"}]}, DECISION),
    "allow": (break_lists, {"prune": [{"tables": "user_emb", "allow": "LIST"}]}, DECISION),
    "no rules": (forget_rules, STEP, DECISION),
    "no list": (forget_rules, {"prune": [{"tables": "user_emb", "deny": "LIST"}]}, "the export did not apply the rule"),
    "first for last": (break_order, {"on_duplicate": "last", "twice": True}, "another one is exported than on_duplicate: last"),
    "last for first": (break_order, {"on_duplicate": "first", "twice": True}, "than on_duplicate: first"),
    "the sample's rows": (widen_lookups, STEP, "is not in the checkpoint, but in the shards"),
    "default row of another table": (take_the_other_default, DEFAULT, STATED),
    "default row ignored": (ignore_defaults, DEFAULT, STATED),
    "zeros for a default row": (zero_defaults, DEFAULT, STATED),
    "zeros in the sample": (zeros_in_the_sample, DEFAULT, SAMPLED),
    "default row cast twice": (cast_twice, {**DEFAULT, "dtype": {"*": "float16"}}, SAMPLED),
    "default row of another scale, int8": (scale_defaults, {**DEFAULT, "dtype": {"*": "int8"}}, SAMPLED),
    "default row of the manifest": (state_another, DEFAULT, STATED),
}  # fmt: skip


def settings_of(case: str, folder: Path) -> dict:
    settings = dict(BROKEN[case][1])
    if "prune" in settings:
        (folder / "ids.txt").write_text("".join(f"{1001 * i}\n" for i in (2, 3, 20)))
        settings["prune"] = [
            {key: str(folder / "ids.txt") if value == "LIST" else value for key, value in rule.items()}
            for rule in settings["prune"]
        ]
    return settings


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_fails_the_export(case: str, tmp_path: Path, monkeypatch) -> None:
    BROKEN[case][0](monkeypatch)
    with pytest.raises(ParityError, match=BROKEN[case][2]) as caught:
        export(tmp_path, **settings_of(case, tmp_path))
    assert caught.value.exit_code == 1
    assert "No manifest was written" in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


UNBROKEN = list({str(settings): case for case, (_, settings, _) in BROKEN.items()}.values())


@pytest.mark.parametrize("case", UNBROKEN)
def test_the_rules_as_they_are_pass(case: str, tmp_path: Path) -> None:
    export(tmp_path, **settings_of(case, tmp_path))
    assert verify(str(tmp_path / "out")).findings == []


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ({"slot": "s", "below": 3}, [3], False),
        ({"slot": "s", "below": 3}, [2], True),
        ({"slot": "s", "below": "1e-7"}, [1e-8], True),
        ({"slot": "s", "below": 2**63}, [2**63 - 1], True),
        ({"slot": "s", "below": 0.5}, [float("nan")], False),
        ({"norm_at_most": 0}, [0.0, -0.0], True),
        ({"norm_at_most": 0}, [0.0, 1e-300], False),
        ({"norm_at_most": 5}, [3.0, 4.0], None),
        ({"norm_at_most": 5}, [3.0, 4.0001], False),
        ({"norm_at_most": 5}, [3.0, 3.9999], True),
        ({"norm_at_most": 5}, [float("nan"), 1.0], False),
        ({"norm_at_most": 5}, [float("-inf"), 1.0], False),
    ],
)
def test_one_rule_on_one_row(rule, values, expected) -> None:
    assert is_pruned(rule, 1, values, None) is expected


def test_norms_agree_with_exact_arithmetic_and_with_the_export() -> None:
    """What is decided is right; what is left open is so near to the bound that rounding decides."""
    rng = random.Random(2)
    num_open = 0
    for _ in range(3000):
        values = [float(np.float32(rng.uniform(-1, 1))) for _ in range(rng.randint(1, 9))]
        exact = sum(Fraction(v) ** 2 for v in values)
        limit = float(exact) ** 0.5 * rng.choice([1, 1, 1 + 2e-16, 1 - 1e-15, 1.001, 0.999])
        answer = is_pruned({"norm_at_most": limit}, 1, values, None)
        num_open += answer is None
        if answer is not None:
            assert answer == (exact <= Fraction(limit) ** 2)
            assert answer == bool(prune._is_short(np.array([values]), limit)[0])
    assert 500 < num_open < 2500


def test_lists_of_ids() -> None:
    listed = np.array([-5, 3, 9], np.int64)
    for number, is_there in ((-5, True), (9, True), (4, False), (10, False)):
        assert is_pruned({"deny": "x"}, number, [], listed) is is_there
        assert is_pruned({"allow": "x"}, number, [], listed) is not is_there


@pytest.mark.parametrize("pattern", ["*", "a*", "*a", "?b*", "[ab]*c", "[!a]*", "a.b", "", "[", "*[0-9]"])
def test_patterns_match_as_those_of_the_shell(pattern: str) -> None:
    from fnmatch import fnmatchcase

    for name in ("a", "ab", "abc", "ba", "c", "", "a.b", "axb", "[", "x9"):
        assert (match_name(pattern, name) is not None) == fnmatchcase(name, pattern), (pattern, name)

"""fg and mc: what is legal passes, every fault is told at once with its feature's full name."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.dense.fg import Features, check_conf, check_inputs, check_tables
from dist_export.dense.fg_load import collect_confs, has_hashed_input, load_conf
from dist_export.errors import ConfigError
from tests.support.properties import examples


def hashed(name: str, **fields):
    return {
        "feature_name": name,
        "feature_type": "id_feature",
        "value_type": "String",
        "gen_key_type": "hash",
        "gen_val_type": "lookup",
        "hash_bucket_size": 1000,
        "embedding_dimension": 8,
    } | fields


def raw(name: str, **fields):
    return {
        "feature_name": name,
        "feature_type": "raw_feature",
        "value_type": "Double",
        "gen_key_type": "idle",
        "gen_val_type": "idle",
    } | fields


def sequence(name: str, *features, length=50, **fields):
    return {
        "feature_name": name,
        "sequence_name": name,
        "sequence_length": length,
        "features": list(features),
    } | fields


def without(entry: dict, *fields: str) -> dict:
    return {key: value for key, value in entry.items() if key not in fields}


def check(*entries, mc=None, fg_rules="rtp", **more) -> Features:
    return check_conf({"features": list(entries)}, mc, fg_rules=fg_rules, **more)


def findings(*entries, **more) -> list[str]:
    """The lines under the head line of the one error."""
    with pytest.raises(ConfigError) as caught:
        check(*entries, **more)
    head, *lines = str(caught.value).split("\n")
    assert f": {len(lines)} finding" in head
    assert "Nothing was written" in head
    return [line.strip() for line in lines]


def only(features: Features):
    (feature,) = features.features
    return feature


# ---- load_conf -----------------------------------------------------------------------------------------------------


def test_a_mapping_is_copied():
    given_conf = OrderedDict(features=({"feature_name": "a"},))
    loaded = load_conf(given_conf, what="fg")
    assert loaded == {"features": [{"feature_name": "a"}]}
    loaded["features"][0]["feature_name"] = "b"
    assert given_conf["features"][0] == {"feature_name": "a"}
    assert type(loaded) is dict


@pytest.mark.parametrize("kind", [str, Path, lambda path: f"file://{path}"])
def test_a_path_or_url_is_read(tmp_path, kind):
    (tmp_path / "fg.json").write_text('{"features": [], "x": [1, 2.5, true, null, "\u00e9"]}', encoding="utf-8")
    assert load_conf(kind(tmp_path / "fg.json"), what="fg") == {"features": [], "x": [1, 2.5, True, None, "\u00e9"]}


def test_any_fsspec_url_is_read():
    import fsspec

    with fsspec.open("memory://test_fg/mc.json", "wb") as file:
        file.write(b'{"user": ["a"]}')
    assert load_conf("memory://test_fg/mc.json", what="mc") == {"user": ["a"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"features": [{"a": 1, "b": 2, "a": 3}]}', r"\$\.features\[0\] has the key 'a' twice"),
        (b'{"features": [], "features": []}', r"\$ has the key 'features' twice"),
        (b'{"x": [0, NaN]}', r"\$\.x\[1\] is NaN, which JSON does not know"),
        (b'{"x": {"y": -Infinity}}', r"\$\.x\.y is -Infinity"),
        (b'{"x": 1e999}', r"\$\.x is 1e999"),
        (b'{"x": 1,\n "y" 2}', r"line 2, column 6"),
        (b"", r"line 1, column 1"),
        (b"[1, 2]", r"the top is \[1, 2\], not an object"),
        (b'"NaN"', r"the top is 'NaN', not an object"),
        (b"NaN", r"not an object"),
        (b'{"x": "\xff"}', r"byte 7 is not UTF-8"),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", r"nested more than"),
        (b'{"x": ' + b"[" * 100_000, r"is not JSON that can be read|nested"),
        (b'{"x": ' + b"9" * 5000 + b"}", r"is not JSON that can be read"),
    ],
)
def test_a_file_that_is_not_strict_json_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "fg.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_conf(path, what="fg_conf_or_path")
    assert str(caught.value).startswith(f"fg_conf_or_path: {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/fg.json", "", "nosuch://bucket/fg.json", "."])
def test_a_file_that_cannot_be_read_is_refused(path):
    with pytest.raises(ConfigError, match=r"fg: .*cannot be read"):
        load_conf(path, what="fg")


@pytest.mark.parametrize("conf", [1, ["features"], b"fg.json", None])
def test_neither_mapping_nor_path_is_refused(conf):
    with pytest.raises(ConfigError, match=r"mc: .* is neither a mapping nor a path"):
        load_conf(conf, what="mc")


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"x": float("nan")}, r"\$\.x is nan"),
        ({1: 2}, r"\$ has the key 1, which is not text"),
        ({"x": {"y": [{1, 2}]}}, r"\$\.x\.y\[0\] is \{1, 2\}, which JSON cannot hold"),
        ({"x": b"bytes"}, r"\$\.x is b'bytes'"),
        ({"x": threading.Lock()}, r"\$\.x is <unlocked"),
    ],
)
def test_a_mapping_of_what_json_cannot_hold_is_refused(conf, message):
    with pytest.raises(ConfigError, match=message):
        load_conf(conf, what="fg")


def test_a_mapping_within_itself_is_refused():
    conf: dict = {}
    conf["x"] = conf
    with pytest.raises(ConfigError, match="nested more than"):
        load_conf(conf, what="fg")


# ---- collect_confs -------------------------------------------------------------------------------------------------


class Fg:
    """As RecIS's FG."""

    def get_fg_conf(self):
        return {"features": [raw("from_fg")]}

    def get_mc_conf(self):
        return {"block": ["from_fg"]}


def test_nothing_given_is_nothing():
    assert collect_confs(None, None, None) == (None, None)


def test_fg_gives_both():
    assert collect_confs(Fg(), None, None) == ({"features": [raw("from_fg")]}, {"block": ["from_fg"]})


def test_an_explicit_conf_wins_over_fg(tmp_path):
    (tmp_path / "mc.json").write_text('{"other": ["b"]}')
    assert collect_confs(Fg(), {"features": []}, tmp_path / "mc.json") == ({"features": []}, {"other": ["b"]})
    assert collect_confs(Fg(), {"features": []}, None)[1] == {"block": ["from_fg"]}


def test_an_empty_conf_is_a_conf():
    assert collect_confs(Fg(), None, {})[1] == {}


def test_only_the_needed_method_is_called():
    assert collect_confs(SimpleNamespace(get_fg_conf=lambda: {"features": []}), None, {}) == ({"features": []}, {})
    assert collect_confs(object(), {"features": []}, {}) == ({"features": []}, {})


def test_fg_may_have_no_conf():
    assert collect_confs(SimpleNamespace(get_fg_conf=lambda: None, get_mc_conf=lambda: None), None, None) == (None,) * 2


def test_fg_without_the_method_is_refused():
    with pytest.raises(ConfigError, match=r"fg: object has no method get_fg_conf\(\)"):
        collect_confs(object(), None, None)


def test_a_failing_method_is_a_config_error():
    class Broken(Fg):
        def get_mc_conf(self):
            raise KeyError("block")

    with pytest.raises(ConfigError, match=r"fg.get_mc_conf\(\) failed: KeyError: 'block'"):
        collect_confs(Broken(), None, None)


def test_a_method_that_returns_no_conf_is_refused():
    with pytest.raises(ConfigError, match=r"fg.get_fg_conf\(\): 3 is neither"):
        collect_confs(SimpleNamespace(get_fg_conf=lambda: 3), None, {})


def test_hashed_input_is_read_from_fg_or_its_parser():
    assert not has_hashed_input(None)
    assert not has_hashed_input(Fg())
    assert has_hashed_input(SimpleNamespace(already_hashed=True))
    assert has_hashed_input(SimpleNamespace(fg_parser=SimpleNamespace(already_hashed=False, hash_in_io=True)))


# ---- what is legal -------------------------------------------------------------------------------------------------

LEGAL = {
    "hash": hashed("f"),
    "value type in any case": hashed("f", value_type="STRING"),
    "combo": hashed("f", feature_type="combo_feature"),
    "match": hashed("f", feature_type="match_feature"),
    "lookup feature": hashed("f", feature_type="lookup_feature", value_type="Integer"),
    "overlap": raw("f", feature_type="overlap_feature"),
    "raw": raw("f"),
    "Integer idle": raw("f", value_type="integer"),
    "idle key looked up": hashed("f", value_type="Integer", gen_key_type="idle", hash_bucket_size=0),
    "boundary": hashed("f", value_type="Double", gen_key_type="boundary", boundaries="0.0, -2,3e5,inf"),
    "String boundary": hashed("f", gen_key_type="boundary", boundaries="1"),
    "mask": raw("f", value_type="String", gen_key_type="mask", mask_out="0;1", hash_bucket_size=7),
    "mask_out as a number": raw("f", value_type="String", gen_key_type="mask", mask_out=0),
    "ev_hash_mod": hashed("f", gen_key_type="ev_hash_mod"),
    "ev_hash type": hashed("f", hash_type="ev_hash"),
    "murmur": hashed("f", hash_type="murmur"),
    "ev_hash_mod sets the hash type": hashed("f", gen_key_type="ev_hash_mod", hash_type="whatever"),
    "digits as text": hashed("f", hash_bucket_size="200000000"),
    "hash without lookup": raw("f", value_type="String", gen_key_type="hash", hash_bucket_size=5),
    "an idle feature's dimension is not read": raw("f", embedding_dimension=0, shared_name=None),
    "many values": hashed("f", value_dimension=0),
    "null is absent": hashed(
        "f",
        boundaries=None,
        compress_strategy=None,
        emb_type=None,
        from_feature=None,
        emb_device=None,
        admit_hook=None,
        filter_hook=None,
        combiner=None,
        value_dimension=None,
    ),
    "all optional fields": hashed(
        "f",
        shared_name="t",
        combiner="sum",
        emb_type="bf16",
        emb_device="cpu",
        trainable=False,
        admit_hook={"name": "ReadOnly"},
        filter_hook={"name": "GlobalStepFilter", "params": {"filter_step": 5000}},
        from_feature="g",
        hash_type="farmhash",
        mask_out="0",
        expression="item:f",
        need_prefix=False,
        column_type="share_emb",
    ),
    "empty vocabulary": hashed("f", vocab_list=[]),
}


@pytest.mark.parametrize("entry", LEGAL.values(), ids=LEGAL)
def test_a_legal_feature_passes(entry):
    assert only(check(entry)).name == "f"
    assert check(entry).notes == ()
    assert only(check(sequence("hist", entry))).name == "hist_f"


def test_no_configuration_at_all_is_legal():
    assert check_conf(None, None, fg_rules="rtp") == Features(features=(), blocks=(), has_mc=False, notes=())


def test_no_features_and_no_blocks_are_legal():
    assert check(mc={}) == Features(features=(), blocks=(), has_mc=True, notes=())


def test_a_lookup_feature_has_its_table_and_width():
    feature = only(check(hashed("f", shared_name="t", embedding_dimension=16, value_dimension=3)))
    assert (feature.kind, feature.tables, feature.dimension, feature.width) == ("lookup", ("t",), 16, 16)
    assert feature.sequence is None
    assert feature.is_used


def test_an_idle_feature_has_its_value_dimension():
    assert only(check(raw("f"))).width == 1
    feature = only(check(raw("f", value_dimension=50)))
    assert (feature.kind, feature.tables, feature.dimension, feature.width) == ("idle", (), None, 50)


def test_a_sub_features_table_has_no_sequence_prefix():
    first, second = check(sequence("hist", hashed("item"), hashed("cate", shared_name="c"))).features
    assert (first.name, first.tables, first.sequence) == ("hist_item", ("item",), "hist")
    assert (second.name, second.tables) == ("hist_cate", ("c",))


@pytest.mark.parametrize(
    ("strategy", "tables", "width"),
    [
        ("yx:50,50,50,50:concat:4", ("t-yx1", "t-yx2", "t-yx3", "t-yx4"), 32),
        ("mh:10,20:concat:0", ("t-mh1", "t-mh2"), 16),
        ("mh:10,20:concat:1", ("t",), 16),
        ("mh:10,20:sum:0", ("t-mh1", "t-mh2"), 8),
    ],
)
def test_a_multihash_feature_has_a_table_for_each_bucket_size_unless_shared(strategy, tables, width):
    entry = hashed(
        "f", gen_key_type="multihash", gen_val_type="multihash_lookup", compress_strategy=strategy, shared_name="t"
    )
    feature = only(check(entry, fg_rules="none"))
    assert (feature.tables, feature.dimension, feature.width) == (tables, 8, width)


def test_two_sequence_entries_may_share_a_name():
    assert [f.name for f in check(sequence("hist", raw("a")), sequence("hist", raw("b"))).features] == [
        "hist_a",
        "hist_b",
    ]


# ---- what RecIS's parser refuses -----------------------------------------------------------------------------------

REFUSED = {
    "feature_type missing": (without(raw("f"), "feature_type"), "feature_type is missing"),
    "value_type missing": (without(raw("f"), "value_type"), "value_type is missing"),
    "gen_key_type missing": (without(raw("f"), "gen_key_type"), "gen_key_type is missing"),
    "gen_val_type missing": (without(raw("f"), "gen_val_type"), "gen_val_type is missing"),
    "value_type null": (raw("f", value_type=None), "value_type None is not text"),
    "feature_type a number": (raw("f", feature_type=1), "feature_type 1 is not text"),
    "gen_key_type unknown": (
        raw("f", gen_key_type="Hash"),
        "gen_key_type 'Hash' is none of idle, boundary, hash, mask, multihash, ev_hash, ev_hash_mod",
    ),
    "gen_key_type a list": (raw("f", gen_key_type=["idle"]), "gen_key_type ['idle'] is not text"),
    "gen_val_type unknown": (
        raw("f", gen_val_type="sum"),
        "gen_val_type 'sum' is none of idle, lookup, multihash_lookup",
    ),
    "value_type unknown": (raw("f", value_type="Float"), "value_type 'Float' is none of string, double, integer"),
    "String idle": (raw("f", value_type="String"), "value_type String cannot go with gen_key_type idle"),
    "String idle looked up": (
        hashed("f", value_type="string", gen_key_type="idle"),
        "value_type String cannot go with gen_key_type idle",
    ),
    "hash_type unknown": (hashed("f", hash_type="farm"), "hash_type 'farm' is none of farmhash, murmur, ev_hash"),
    "hash_type unknown where idle": (raw("f", hash_type="x"), "hash_type 'x' is none of farmhash, murmur, ev_hash"),
    "hash_type null": (hashed("f", hash_type=None), "hash_type None is not text"),
    "emb_type unknown": (hashed("f", emb_type="fp32"), "emb_type 'fp32' is none of float, fp16, bf16, int8"),
    "boundaries not numeric": (raw("f", boundaries="0.0,x"), "boundaries holds 'x', which is not a number"),
    "boundaries nan": (raw("f", boundaries="nan"), "boundaries holds 'nan', which is not a number"),
    "boundaries empty": (raw("f", boundaries=""), "boundaries holds '', which is not a number"),
    "boundaries a list": (raw("f", boundaries=[1.0]), "boundaries [1.0] is not text such as '0.0,2.0,3.0'"),
    "boundaries missing": (raw("f", gen_key_type="boundary"), "gen_key_type boundary needs boundaries"),
    "hash_bucket_size text": (hashed("f", hash_bucket_size="1k"), "hash_bucket_size '1k' is not an integer"),
    "hash_bucket_size float": (hashed("f", hash_bucket_size=10.5), "hash_bucket_size 10.5 is not an integer"),
    "hash_bucket_size true": (hashed("f", hash_bucket_size=True), "hash_bucket_size True is not an integer"),
    "hash_bucket_size null": (hashed("f", hash_bucket_size=None), "hash_bucket_size None is not an integer"),
    "embedding_dimension missing": (
        without(hashed("f"), "embedding_dimension"),
        "gen_val_type lookup needs an embedding_dimension",
    ),
    "embedding_dimension zero": (
        hashed("f", embedding_dimension=0),
        "embedding_dimension 0 is not a positive integer",
    ),
    "embedding_dimension text": (
        hashed("f", embedding_dimension="8"),
        "embedding_dimension '8' is not a positive integer",
    ),
    "value_dimension zero": (raw("f", value_dimension=0), "value_dimension 0 is not a positive integer"),
    "value_dimension text": (hashed("f", value_dimension="x"), "value_dimension 'x' is not a positive integer"),
    "shared_name empty": (hashed("f", shared_name=""), "shared_name '' is not the name of a table"),
    "shared_name null": (hashed("f", shared_name=None), "shared_name None is not the name of a table"),
    "combiner a number": (hashed("f", combiner=1), "combiner 1 is not text"),
    "from_feature a list": (raw("f", from_feature=["g"]), "from_feature ['g'] is not text"),
    "emb_device a number": (hashed("f", emb_device=0), "emb_device 0 is not text"),
    "admit_hook text": (hashed("f", admit_hook="ReadOnly"), "admit_hook 'ReadOnly' is not an object"),
    "filter_hook a list": (hashed("f", filter_hook=[1]), "filter_hook [1] is not an object"),
    "multihash alone": (
        hashed("f", gen_key_type="multihash", gen_val_type="multihash_lookup"),
        "gen_key_type multihash and gen_val_type multihash_lookup needs a compress_strategy",
    ),
}


@pytest.mark.parametrize("fg_rules", ["rtp", "none"])
@pytest.mark.parametrize(("entry", "message"), REFUSED.values(), ids=REFUSED)
def test_what_recis_refuses_is_refused_under_any_rules(entry, message, fg_rules):
    assert f"feature 'f': {message}" in findings(entry, fg_rules=fg_rules)
    assert f"feature 'hist_f': {message}" in findings(sequence("hist", entry), fg_rules=fg_rules)


@pytest.mark.parametrize(
    "strategy", ["", "mh", "mh:1,2:concat", "mh::concat:0", "mh:1,x:concat:0", ":1:concat:0", "mh:0:concat:1", "a:1::1"]
)
def test_a_malformed_compress_strategy_is_refused(strategy):
    (line,) = findings(hashed("f", compress_strategy=strategy), fg_rules="none")
    assert line == f"feature 'f': compress_strategy {strategy!r} is not of the form 'prefix:b1,b2,..:combiner:0|1'"


def test_a_compress_strategy_that_is_not_text_is_refused():
    (line,) = findings(hashed("f", compress_strategy=4), fg_rules="none")
    assert "compress_strategy 4 is not of the form" in line


def test_mask_is_refused_where_input_is_already_hashed():
    entry = raw("f", value_type="String", gen_key_type="mask")
    assert check(entry).features
    assert findings(entry, already_hashed=True) == [
        "feature 'f': gen_key_type mask cannot go with input that is already hashed"
    ]


def test_a_missing_feature_name_is_refused_with_its_place():
    entry = without(raw("f"), "feature_name")
    assert findings(raw("g"), entry) == ["features[1]: feature_name is missing"]
    assert findings(sequence("hist", entry)) == ["sequence 'hist': features[0]: feature_name is missing"]
    assert findings(raw("")) == ["features[0]: feature_name '' is not a name"]
    assert findings(raw(3)) == ["features[0]: feature_name 3 is not a name"]


# ---- what serving does not support ---------------------------------------------------------------------------------

UNSERVED = {
    "bucket size 0": (hashed("f", hash_bucket_size=0), "gen_key_type hash with hash_bucket_size 0"),
    "bucket size absent": (without(hashed("f"), "hash_bucket_size"), "gen_key_type hash with hash_bucket_size 0"),
    "bucket size below 0": (hashed("f", hash_bucket_size=-1), "gen_key_type hash with hash_bucket_size -1"),
    "bucket size '0'": (hashed("f", hash_bucket_size="0"), "gen_key_type hash with hash_bucket_size 0"),
    "ev_hash": (
        hashed("f", gen_key_type="ev_hash"),
        "gen_key_type ev_hash, which hashes with hash_bucket_size 0",
    ),
    "ev_hash_mod of 0": (
        hashed("f", gen_key_type="ev_hash_mod", hash_bucket_size=0),
        "gen_key_type ev_hash_mod with hash_bucket_size 0",
    ),
    "multihash": (
        hashed("f", gen_key_type="multihash", gen_val_type="multihash_lookup", compress_strategy="yx:50,50:concat:4"),
        "multihash (gen_key_type, gen_val_type, compress_strategy)",
    ),
    "compress_strategy alone": (hashed("f", compress_strategy="mh:5:concat:0"), "multihash (compress_strategy)"),
    "vocab_list": (hashed("f", vocab_list=["a"]), "a vocabulary (vocab_list)"),
    "vocab_dict and vocab_file": (
        hashed("f", vocab_dict={"a": 1}, vocab_file="v.txt"),
        "a vocabulary (vocab_dict, vocab_file)",
    ),
}


@pytest.mark.parametrize(("entry", "message"), UNSERVED.values(), ids=UNSERVED)
def test_what_rtp_does_not_support_is_refused_for_rtp_only(entry, message):
    assert findings(entry) == [f"feature 'f': not supported by RTP: {message}"]
    assert findings(sequence("hist", entry)) == [f"feature 'hist_f': not supported by RTP: {message}"]
    assert only(check(entry, fg_rules="none")).name == "f"


# ---- the shape of the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conf", [{}, {"features": None}, {"features": {"f": raw("f")}}, {"feature": []}, [], "fg", 3])
def test_an_fg_without_a_list_of_features_is_refused(conf):
    with pytest.raises(ConfigError, match=r"1 finding.*\n  fg has no list 'features'"):
        check_conf(conf, None, fg_rules="none")


def test_an_fg_without_features_does_not_drag_mc_along():
    with pytest.raises(ConfigError, match="1 finding"):
        check_conf({}, {"user": ["f"]}, fg_rules="rtp")


@pytest.mark.parametrize("entry", [None, 3, "f", ["f"]])
def test_an_entry_that_is_no_object_is_refused(entry):
    assert findings(raw("f"), entry) == [f"features[1] is {entry!r}, not an object"]
    assert findings(sequence("hist", entry)) == [f"sequence 'hist': features[0] is {entry!r}, not an object"]


def test_a_feature_defined_twice_is_refused_once():
    assert findings(raw("f"), raw("f"), raw("f")) == ["feature 'f': defined 3 times"]
    assert findings(raw("a_b"), sequence("a", raw("b"))) == ["feature 'a_b': defined 2 times"]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "0 is not a positive integer"),
        (-1, "-1 is not a positive integer"),
        ("50", "'50' is not a positive integer"),
        (50.0, "50.0 is not a positive integer"),
        (None, "None is not a positive integer"),
        (True, "True is not a positive integer"),
    ],
)
def test_a_sequence_length_that_is_no_positive_integer_is_refused(length, message):
    assert findings(sequence("hist", raw("f"), length=length)) == [f"sequence 'hist': sequence_length {message}"]


def test_a_sequence_without_length_or_features_is_refused():
    assert findings({"feature_name": "hist", "sequence_name": "hist"}) == [
        "sequence 'hist': sequence_length is missing",
        "sequence 'hist': no list 'features'",
    ]


def test_a_sequence_name_that_is_no_name_is_refused():
    assert findings(sequence(None, raw("f"))) == ["features[0]: sequence_name None is not a name"]


def test_a_sequence_may_lack_a_feature_name_and_is_noted():
    entry = without(sequence("hist", raw("f")), "feature_name")
    features = check(entry)
    assert only(features).name == "hist_f"
    assert features.notes == ("sequence 'hist': feature_name is missing: RecIS cannot load this fg.json again",)


def test_all_findings_come_in_one_error():
    lines = findings(
        raw("a", gen_key_type="x", gen_val_type="y"),
        hashed("b", hash_bucket_size=0),
        sequence("hist", hashed("c", emb_type="z"), length=0),
        None,
        mc={"block": ["a", "b", "hist", "nowhere"]},
    )
    assert lines == [
        "sequence 'hist': sequence_length 0 is not a positive integer",
        "features[3] is None, not an object",
        "feature 'a': gen_key_type 'x' is none of idle, boundary, hash, mask, multihash, ev_hash, ev_hash_mod",
        "feature 'a': gen_val_type 'y' is none of idle, lookup, multihash_lookup",
        "feature 'b': not supported by RTP: gen_key_type hash with hash_bucket_size 0",
        "feature 'hist_c': emb_type 'z' is none of float, fp16, bf16, int8",
        "block 'block': 'nowhere' is no feature of fg",
    ]


def test_a_finding_stays_on_its_line():
    (line,) = findings(raw("a\nb", gen_key_type="x" * 1000))
    assert r"feature 'a\nb'" in line
    assert len(line) < 400


def test_a_number_of_any_length_can_be_told():
    (line,) = findings(hashed("f", combiner=10**5000))
    assert "combiner (int) is not text" in line


# ---- mc ------------------------------------------------------------------------------------------------------------

FG = (
    hashed("user_id", embedding_dimension=16),
    raw("price"),
    raw("vector", value_dimension=50),
    sequence("hist", hashed("item_id", embedding_dimension=32), raw("rate")),
)


def blocks(mc, *entries) -> dict:
    return {block.name: (block.features, block.width) for block in check(*(entries or FG), mc=mc).blocks}


def test_a_block_is_as_wide_as_its_features():
    assert blocks({"user": ["user_id", "price"], "vector": ["vector"]}) == {
        "user": (("user_id", "price"), 17),
        "vector": (("vector",), 50),
    }


def test_a_sequences_name_stands_for_its_sub_features():
    assert blocks({"behaviour": ["hist"]}) == {"behaviour": (("hist_item_id", "hist_rate"), 33)}


def test_a_sub_feature_may_be_named_in_full():
    assert blocks({"behaviour": ["hist_item_id"]}) == {"behaviour": (("hist_item_id",), 32)}


def test_a_block_with_a_sequences_name_takes_short_or_full_names():
    expected = {"hist": (("hist_item_id", "hist_rate"), 33)}
    assert blocks({"hist": ["item_id", "rate"]}) == expected
    assert blocks({"hist": ["hist_item_id", "hist_rate"]}) == expected
    assert blocks({"hist": ["hist"]}) == expected


def test_a_plain_feature_comes_before_a_sequence_of_its_name():
    assert blocks({"b": ["hist"]}, raw("hist"), sequence("hist", raw("x", value_dimension=9))) == {"b": (("hist",), 1)}


def test_names_may_be_objects_and_repeat():
    assert blocks({"a": [{"column_name": "price"}, "price"], "b": ["price"]}) == {
        "a": (("price", "price"), 2),
        "b": (("price",), 1),
    }


def test_an_unknown_name_is_refused_with_the_nearest():
    assert findings(*FG, mc={"user": ["user_idd", "User_Id", "zzz"], "hist": ["itemid"]}) == [
        "block 'user': 'user_idd' is no feature of fg (nearest: 'user_id')",
        "block 'user': 'User_Id' is no feature of fg (nearest: 'user_id')",
        "block 'user': 'zzz' is no feature of fg",
        "block 'hist': 'itemid' is no feature of fg (nearest: 'hist_item_id')",
    ]


def test_a_short_name_counts_in_its_sequences_block_only():
    assert findings(*FG, mc={"user": ["rate"]}) == ["block 'user': 'rate' is no feature of fg (nearest: 'hist_rate')"]


def test_suggestions_stop_before_they_take_long():
    """The first 20 wrong names have one."""
    wrong = [f"price{letter}" for letter in "abcdefghijklmnopqrstuv"]
    told = [line.endswith("(nearest: 'price')") for line in findings(*FG, mc={"b": wrong})]
    assert told == [True] * 20 + [False] * 2


@pytest.mark.parametrize(
    ("mc", "message"),
    [
        ([], "mc is [], not an object of blocks"),
        ("mc.json", "mc is 'mc.json', not an object of blocks"),
        ({"user": "price"}, "block 'user': 'price' is not a list of features"),
        ({"user": None}, "block 'user': None is not a list of features"),
        ({"user": {"price": 1}}, "block 'user': {'price': 1} is not a list of features"),
        ({"user": []}, "block 'user': names no feature"),
        ({"user": [3]}, "block 'user': 3 is not the name of a feature"),
        ({"user": [["price"]]}, "block 'user': ['price'] is not the name of a feature"),
        ({"user": [{"name": "price"}]}, "block 'user': {'name': 'price'} is not the name of a feature"),
        ({3: ["price"]}, "block 3: the name is not text"),
    ],
)
def test_a_malformed_mc_is_refused_with_or_without_fg(mc, message):
    assert findings(*FG, mc=mc) == [message]
    with pytest.raises(ConfigError) as caught:
        check_conf(None, mc, fg_rules="rtp")
    assert str(caught.value).endswith(f"\n  {message}")


def test_a_malformed_mc_hides_no_fault_of_fg():
    assert len(findings(raw("f", gen_key_type="x"), mc=[])) == 2


def test_an_empty_sequence_makes_no_block():
    assert findings(sequence("hist"), mc={"b": ["hist"]}) == ["block 'b': the sequence 'hist' has no features"]


def test_mc_alone_has_blocks_of_unknown_width():
    (block,) = check_conf(None, {"user": ["a", {"column_name": "b"}]}, fg_rules="rtp").blocks
    assert (block.features, block.width) == (("a", "b"), None)


def test_the_faults_of_what_mc_does_not_use_are_noted_not_refused():
    """RecIS parses only what mc names, so it trained with this fg.json."""
    features = check(
        raw("price"),
        raw("broken", gen_key_type="x"),
        hashed("big", hash_bucket_size=0),
        sequence("old", None, raw("y", value_type="?"), length=0),
        sequence("hist", raw("rate"), raw("broken", gen_val_type="x")),
        mc={"b": ["price"], "hist": ["rate"]},
    )
    assert [(feature.name, feature.is_used) for feature in features.features] == [("price", True), ("hist_rate", True)]
    assert len(features.notes) == 6
    assert all(note.endswith("(not refused: mc does not use it)") for note in features.notes)
    assert sorted(note.split(":")[0] for note in features.notes) == [
        "feature 'big'",
        "feature 'broken'",
        "feature 'hist_broken'",
        "feature 'old_y'",
        "sequence 'old'",
        "sequence 'old'",
    ]


def test_the_faults_of_a_used_sequence_are_refused():
    entry = sequence("hist", raw("a"), None, length=0)
    for mc in ({"b": ["hist"]}, {"b": ["hist_a"]}, {"hist": ["a"]}):
        assert len(findings(raw("price"), entry, mc={"p": ["price"]} | mc)) == 2


def test_features_of_different_length_in_one_block_are_noted():
    features = check(*FG, sequence("new", raw("rate"), length=5), mc={"b": ["price", "hist"], "c": ["hist", "new"]})
    assert features.notes == (
        "block 'b': its features differ in sequence length (none, 50), so RecIS cannot join them",
        "block 'c': its features differ in sequence length (5, 50), so RecIS cannot join them",
    )


# ---- check_tables --------------------------------------------------------------------------------------------------


def test_tables_of_the_right_dimension_pass():
    check_tables(check(*FG), {"user_id": 16, "item_id": 32, "more": 1})


def test_absent_tables_and_other_dimensions_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        check_tables(check(*FG, hashed("x", shared_name="zzz")), {"user_id": 8, "item_ids": 32})
    assert str(caught.value).split("\n  ") == [
        "fg against the checkpoint: 3 findings. Nothing was written.",
        "feature 'user_id': embedding_dimension is 16, but table 'user_id' of the checkpoint has 8 columns",
        "feature 'hist_item_id': its table 'item_id' is not in the checkpoint (nearest: 'item_ids')",
        "feature 'x': its table 'zzz' is not in the checkpoint",
    ]


def test_only_used_features_need_their_table():
    check_tables(check(*FG, mc={"user": ["user_id"]}), {"user_id": 16})
    check_tables(check(*FG, mc={}), {})
    check_tables(check_conf(None, {"user": ["user_id"]}, fg_rules="rtp"), {})


def test_every_table_of_a_multihash_is_needed():
    entry = hashed("f", gen_key_type="multihash", gen_val_type="multihash_lookup", compress_strategy="mh:9,9:concat:0")
    features = check(entry, fg_rules="none")
    check_tables(features, {"f-mh1": 8, "f-mh2": 8})
    with pytest.raises(ConfigError, match=r"1 finding.*\n.*'f-mh2' is not in the checkpoint"):
        check_tables(features, {"f-mh1": 8})


# ---- check_inputs --------------------------------------------------------------------------------------------------


def test_blocks_as_wide_as_their_inputs_pass():
    features = check(*FG, mc={"user": ["user_id", "price"], "hist": ["item_id"]})
    assert check_inputs(features, {"user": (2, 17), "hist": (2, 50, 32)}) == ()


def test_what_mc_and_the_inputs_do_not_share_is_told():
    features = check(*FG, mc={"user": ["user_id"], "other": ["price"]})
    assert check_inputs(features, {"user": (2, 16), "bias": (2, 1)}) == (
        "input 'bias' is not listed in mc",
        "block 'other' of mc is no input",
    )


def test_other_widths_are_refused_together():
    features = check(*FG, mc={"user": ["user_id", "price"], "hist": ["hist"], "p": ["price"], "v": ["vector"]})
    with pytest.raises(ConfigError) as caught:
        check_inputs(features, {"user": (2, 16), "hist": (2, 33, 50), "p": (), "v": (2, 50)})
    assert str(caught.value).split("\n  ") == [
        "mc against the inputs of the dense arch: 3 findings. Nothing was written.",
        (
            "block 'user': its features have 17 columns, but the input has 16 columns "
            "(features 'user_id, price', input shape [2, 16])"
        ),
        (
            "block 'hist': its features have 33 columns, but the input has 50 columns "
            "(features 'hist_item_id, hist_rate', input shape [2, 33, 50])"
        ),
        "block 'p': its features have 1 columns, but the input has no dimension (features 'price', input shape [])",
    ]


def test_without_mc_nothing_is_said_of_the_inputs():
    assert check_inputs(check(*FG), {"user": (2, 3)}) == ()


def test_without_fg_only_the_names_are_compared():
    features = check_conf(None, {"user": ["user_id"]}, fg_rules="rtp")
    assert check_inputs(features, {"user": (2, 3), "x": (2, 3)}) == ("input 'x' is not listed in mc",)


# ---- anything at all -----------------------------------------------------------------------------------------------

WORDS = ["", "f", "g", "idle", "hash", "lookup", "multihash", "String", "Double", "mh:1,2:concat:0", "0,1", "farmhash"]
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.sampled_from(WORDS) | st.text(max_size=3)
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)
FIELDS = sorted(
    {field for entry, _ in (*REFUSED.values(), *UNSERVED.values()) for field in entry}
    | {"sequence_name", "sequence_length", "features", "vocab_list"}
)
NEARLY = st.builds(
    lambda entry, changes, lost: without(entry | changes, *lost),
    st.sampled_from([*LEGAL.values(), *FG]),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
    st.lists(st.sampled_from(FIELDS), max_size=1),
)
ENTRIES = st.lists(NEARLY | st.builds(lambda s, subs: s | {"features": subs}, NEARLY, st.lists(NEARLY)), max_size=3)
BLOCKS = st.dictionaries(
    st.sampled_from(["b", "hist", "f"]) | SCALARS,
    st.lists(st.sampled_from(["f", "price", "hist", "hist_f", "item_id"]) | ANYTHING, max_size=3) | ANYTHING,
    max_size=3,
)


@examples(300)
@given(
    fg_conf=st.builds(lambda entries: {"features": entries}, ENTRIES) | ANYTHING,
    mc_conf=BLOCKS | ANYTHING,
    fg_rules=st.sampled_from(["rtp", "none"]),
)
def test_whatever_is_given_either_passes_or_is_a_config_error(fg_conf, mc_conf, fg_rules):
    try:
        features = check_conf(fg_conf, mc_conf, fg_rules=fg_rules)
    except ConfigError as error:
        head, *lines = str(error).split("\n")
        assert f"{len(lines):,} finding" in head
        return
    for feature in features.features:
        assert feature.width > 0
        assert all(feature.tables)
    for block in features.blocks:
        assert block.width is None or block.width > 0


@examples(100)
@given(conf=st.dictionaries(SCALARS, ANYTHING, max_size=3))
def test_whatever_mapping_is_loaded_is_json_or_a_config_error(conf):
    try:
        loaded = load_conf(conf, what="fg")
    except ConfigError:
        return
    assert json.loads(json.dumps(loaded, allow_nan=False)) == loaded

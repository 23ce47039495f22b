"""Credentials in options and URLs: what a message says of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dist_export import redact
from dist_export.config.loader import load_config
from dist_export.errors import ConfigError
from dist_export.redact import note_secrets, redact_text
from dist_export.storage.urls import open_directory


@pytest.fixture(autouse=True)
def forget(monkeypatch) -> None:
    monkeypatch.setattr(redact, "_secrets", set())


@pytest.mark.parametrize(
    "options",
    [
        {"secret": "hush-hush"},
        {"client_kwargs": {"aws_secret_access_key": "hush-hush"}},
        {"credentials": {"any": {"thing": ["hush-hush"]}}},
        {"connection_string": "hush-hush"},
        {"sas_token": "hush-hush"},
    ],
)
def test_values_under_telling_keys(options: dict) -> None:
    note_secrets(options)
    assert redact_text("it says hush-hush twice: hush-hush") == "it says *** twice: ***"
    assert str(ConfigError("hush-hush")) == "***"


def test_other_values_stay() -> None:
    note_secrets(
        {"anon": True, "endpoint_url": "http://here:9000", "key": "short", "client_kwargs": {"region": "north-1"}}
    )
    assert redact_text("http://here:9000 short north-1") == "http://here:9000 short north-1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("hdfs://me:pass@host/x", "hdfs://***@host/x"),
        ("https://host/x?sv=1&sig=abc%3D&se=2", "https://host/x?sv=1&sig=***&se=2"),
        ("s3://bucket/key=1/x", "s3://bucket/key=1/x"),
        ("/plain/me@here", "/plain/me@here"),
        ("host/x?sv=1&sig=abc%3D&se=2", "host/x?sv=1&sig=***&se=2"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert redact_text(f"{url} is not there") == f"{shown} is not there"


def test_a_directory_is_opened_as_given_and_shown_without() -> None:
    directory = open_directory("memory://me:secret@x/out")
    assert directory.url == "memory://***@x/out"
    assert "secret" in directory.child("y").path


@pytest.mark.parametrize(
    ("url", "repeated", "shown"),
    [
        ("memory://u:hush-hush@x/y", "/u:hush-hush@x/y", "/***@x/y"),
        ("memory://u:hush-hush@x/y", "login u with hush-hush failed", "login u with *** failed"),
        ("memory://u:pw@x/y", "//u:pw@x and pw", "//***@x and pw"),
        ("memory://:pw@x/y", "at :pw@x", "at ***@x"),
        ("memory://u:a%2Fb%40c!@x/y", "u:a/b@c!@x, a/b@c!", "***@x, ***"),
        ("memory://me@x/y", "/me@x/y", "/me@x/y"),
    ],
)
def test_a_password_of_a_url_is_known_without_its_scheme(url: str, repeated: str, shown: str) -> None:
    """As libraries repeat it, once a directory was opened, or in the very message that has the URL."""
    assert redact_text(f"{repeated} of {url}").startswith(f"{shown} of memory://***@x/y")
    open_directory(url)
    assert str(ConfigError(repeated)) == shown


def test_a_library_s_error_shows_no_password_of_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def fail(url: str, **_: object) -> None:
        raise OSError(f"no such bucket: {url.partition(':/')[2]}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ConfigError) as caught:
        open_directory("memory://u:hush-hush@x/y")
    assert "hush" not in str(caught.value)
    assert "no such bucket: /***@x/y" in str(caught.value)


@pytest.mark.parametrize("options", [[1], [], "hush-hush", {1: 2}])
@pytest.mark.parametrize("name", ["storage_options", "target_storage_options", "registry_options", "model_args"])
def test_options_that_are_no_mapping_by_name_are_one_line(name: str, options: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}.*expected a") as caught:
        load_config({"ckpt_dir": "a", "export_dir": "b", name: options})
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value) or name == "model_args"
    if name == "storage_options":
        with pytest.raises(ConfigError):
            open_directory("memory://x", options or [1])


def test_options_of_the_wrong_type_are_not_quoted() -> None:
    for name in ("storage_options", "target_storage_options"):
        with pytest.raises(ConfigError, match=name) as caught:
            load_config({"ckpt_dir": "a", "export_dir": "b", name: "hush-hush"})
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "advice"),
    [
        ("s3://b/x", "s3fs", "pip install s3fs (the extra [s3] of dist_export)"),
        ("gs://b/x", "gcsfs", "pip install gcsfs"),
        ("az://b/x", "adlfs", "pip install adlfs"),
        ("oss://b/x", "ossfs", "pip install ossfs"),
    ],
)
def test_a_missing_package_is_named(url: str, module: str, advice: str) -> None:
    opening = f"from dist_export.storage.urls import open_directory\nopen_directory({url!r})\n"
    script = f"import sys; sys.modules[{module!r}] = None\n{opening}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"{url}: the package that {url.partition(':')[0]}:// needs is missing" in done.stderr
    assert advice in done.stderr


def test_source_and_target_may_have_options_of_their_own() -> None:
    config = load_config({"ckpt_dir": "a", "export_dir": "b", "storage_options": {"x": 1}})
    assert config.options_of_target == {"x": 1}
    assert config.with_changes(target_storage_options={}).options_of_target == {}

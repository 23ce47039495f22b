"""The command ``report``: one HTML page about a package."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from dist_export._version import VERSION
from dist_export.config.describe import Option
from dist_export.config.loader import PATH_OPTIONS
from dist_export.diff.compare import diff
from dist_export.errors import ConfigError, DistExportError, PackageError, UserError
from dist_export.humanize import amount
from dist_export.package.reader import Package, open_package
from dist_export.redact import first_line, redact_text
from dist_export.report.entries import Found
from dist_export.report.facts import describe_report
from dist_export.report.page import render_page
from dist_export.report.read import read_events, read_norms, read_versions
from dist_export.reporting.printing import print_lines
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

USAGE = {
    "report": (
        "usage: dist_export report PATH [--against OTHER] --out FILE.html [--key value ...]\n\nWrite one HTML page about a "
        "package: its tables with norms, dead, NaN and Inf rows, its shards, the run, inputs and outputs, parity and drift. It "
        "opens offline. Exit code 2: a package cannot be read, or the page cannot be written."
    )
}
OPTIONS = {
    "report": {
        **{name: PATH_OPTIONS[name] for name in ("storage_options", "registry_options")},
        "out": Option(hint=str | None, default=None, text="The page to write. A file that is there is replaced."),
        "against": Option(hint=str | None, default=None, text="An older package, to compare PATH with as `diff` does."),
        "base": Option(
            hint=str | None, default=None, text="Base of a delta package. Null looks at its old path, and beside PATH."
        ),
        "sample_rows": Option(
            hint=int, default=100_000, text="Rows that are read of each table at most, spread evenly. 0 reads all."
        ),
        "events": Option(hint=str | None, default=None, text="The events of the run. Null takes PATH.events.jsonl."),
    }
}
NAMES = {"report": ("path",)}


def run(_: str, arguments: Mapping[str, Any]) -> None:
    """Write the page, and print where it is. UserError if a package cannot be read, ConfigError if the page cannot be written."""
    if not arguments["out"]:
        raise ConfigError("--out is missing; give the file to write, such as report.html")
    if arguments["sample_rows"] < 0:
        raise ConfigError(f"--sample_rows is {arguments['sample_rows']}; give a number of rows, or 0 for all")
    try:
        page = _make_page(arguments)
    except PackageError as error:  # nothing is exported here: a package that cannot be read is a wrong argument
        raise UserError(str(error)) from error
    folder, name = _split(arguments["out"], arguments)
    try:
        folder.write(name, page)
    except (OSError, DistExportError) as error:
        raise _refuse_out(arguments["out"], first_line(error)) from None
    print_lines([f"{redact_text(arguments['out'])} is written, {amount(len(page))}"])


def _make_page(arguments: Mapping[str, Any]) -> bytes:
    opening = {name: arguments[name] for name in ("storage_options", "registry_options")}
    options = arguments["storage_options"]
    path, other = arguments["path"], arguments["against"]
    with ExitStack() as stack:
        package = stack.enter_context(open_package(path, base=arguments["base"], **opening))
        others = [] if other is None else [stack.enter_context(open_package(other, **opening))]
        _check_out(arguments, [package, *others])
        found = Found(
            events=read_events(package.directory, arguments["events"], options),
            versions=read_versions(package.directory, options),
            norms=read_norms(package, sample_rows=arguments["sample_rows"]),
            against=None if other is None else diff(other, path, **opening),
        )
        moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        facts = describe_report(
            package.manifest,
            package.directory.url,
            found,
            sample_rows=arguments["sample_rows"],
            made_by=f"dist_export {VERSION}, {moment}",
        )
    return render_page(facts)


def _split(out: str, arguments: Mapping[str, Any]) -> tuple[Directory, str]:
    """Return the directory of the page, and its name."""
    place = out if "://" in out else os.path.abspath(os.path.expanduser(out))
    folder, _, name = place.rpartition("/")
    if not name or "://" in f"{name}/" or folder.endswith(":/"):
        raise _refuse_out(out, "it names no file")
    return open_directory(folder or "/", arguments["storage_options"], follow_links=True), name


def _check_out(arguments: Mapping[str, Any], packages: Sequence[Package]) -> None:
    """Refuse a page that would be within a package, or in the place of a directory. ConfigError."""
    out = arguments["out"]
    folder, name = _split(out, arguments)
    for package in packages:
        inner, outer = (_real(directory) for directory in (folder, package.directory))
        if folder.is_same_store(package.directory) and f"{inner}/".startswith(f"{outer}/"):
            raise _refuse_out(out, f"it would be a file of the package {package.directory.url}")
    if folder.is_local and os.path.isdir(folder.join(name)):
        raise _refuse_out(out, "it is a directory")


def _real(directory: Directory) -> str:
    return (os.path.realpath(directory.path) if directory.is_local else directory.path).rstrip("/")


def _refuse_out(out: str, why: str) -> ConfigError:
    return ConfigError(f"--out {redact_text(out)} cannot be written: {why}. Nothing was written; give another --out")

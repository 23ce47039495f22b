"""Model registries: MLflow's own, on a SQLite file, and a resolver of somebody else's behind an entry point."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dist_export
from dist_export import cli
from dist_export.errors import ConfigError, ExportError
from dist_export.pipeline import locate
from dist_export.pipeline.run_dir import FoundCheckpoint
from dist_export.registry import base
from dist_export.registry.base import Registered, Resolved
from dist_export.registry.mlflow import MlflowRegistry
from dist_export.verify.verify import verify
from tests.support import ROOT, exports, tiny_model, torchrec_shape
from tests.support.recis_writer import make_tables, write_checkpoint

SETTINGS = {
    "model": tiny_model.MODEL,
    "dataset": tiny_model.DATASET,
    "filter_sparse_opt": True,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its database layer warn of their own dependencies


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making the tables takes a second, so once; each test has models of its own."""
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/registry.db"


@pytest.fixture
def client(database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return MlflowClient(registry_uri=database)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "_").replace("]", "")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def make_version(client: Any, name: str, source: Path | str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    return client.create_model_version(name, source=str(source)).version


def test_a_version_an_alias_and_the_latest_are_resolved_to_what_they_are_now(
    client: Any, name: str, checkpoint: Path, database: str
) -> None:
    first = make_version(client, name, checkpoint)
    second = make_version(client, name, f"file://{checkpoint}")
    client.set_registered_model_alias(name, "champion", first)
    registry = MlflowRegistry(registry_uri=database)
    assert registry.resolve(f"models:/{name}/{second}") == Resolved(str(checkpoint), f"models:/{name}/{second}")
    assert registry.resolve(f"models:/{name}@champion").uri == f"models:/{name}/{first}"
    assert registry.resolve(f"models:/{name}/latest").uri == f"models:/{name}/{second}"


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("/99", "not found"),
        ("@nobody", "alias nobody not found"),
        ("", "give a version or an alias"),
        ("/1/2", "is no URI of MLflow's registry"),
    ],
)
def test_what_the_registry_does_not_have(client: Any, name: str, end: str, message: str, tmp_path: Path) -> None:
    model = name.split("_", maxsplit=1)[0]
    make_version(client, model, "/nowhere")
    with pytest.raises(ConfigError, match=message):
        exports.export({"ckpt_dir": f"models:/{model}{end}", "export_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_a_version_whose_source_is_gone_is_refused(client: Any, name: str, tmp_path: Path) -> None:
    make_version(client, name, tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"whose source .*/gone is not there"):
        exports.export({"ckpt_dir": f"models:/{name}/1", "export_dir": str(tmp_path / "out")})


def test_from_a_version_to_a_new_version(client: Any, name: str, checkpoint: Path, tmp_path: Path) -> None:
    """By alias in; out under a name, by reference, with what a reader of the registry wants to know."""
    make_version(client, name, checkpoint)
    client.set_registered_model_alias(name, "champion", "1")
    config = {
        "ckpt_dir": f"models:/{name}@champion",
        "export_dir": f"models:/{name}_serving",
        "registry_options": {"location": str(tmp_path / "packages")},
        **SETTINGS,
    }
    manifest = exports.export(config)
    assert manifest.source.uri == f"models:/{name}/1"
    made = client.get_model_version(f"{name}_serving", "1")
    package = Path(made.source)
    assert package.parent == tmp_path / "packages" / f"{name}_serving"
    assert verify(str(package)).findings == []
    assert dist_export.open_package(package).manifest.digest == manifest.digest == made.tags["dist_export.digest"]
    assert made.tags["dist_export.source"] == f"models:/{name}/1"
    signature = json.loads(made.tags["dist_export.signature"])
    assert [column["name"] for column in signature["inputs"]] == [entry.name for entry in manifest.dense.inputs]
    assert all(column["shape"][0] == -1 for column in signature["inputs"])
    assert made.tags["dist_export.outputs"] == ",".join(entry.name for entry in manifest.dense.outputs)
    assert cli.main(["verify", f"models:/{name}_serving/1"]) == 0
    assert dist_export.open_package(f"models:/{name}_serving/1").manifest.digest == manifest.digest
    assert exports.export(config) == manifest, "the same checkpoint with the same settings is the same package"


@pytest.mark.parametrize("is_placed", [False, True])
def test_relative_paths_are_registered_from_the_root_on(
    client: Any, name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_placed: bool
) -> None:
    """Whoever reads the registry has another working directory."""
    monkeypatch.chdir(tmp_path)
    place = {"export_dir": f"models:/{name}", "registry_options": {"location": "packages"}}
    config = place if is_placed else {"export_dir": "out/m1", "register": f"models:/{name}"}
    exports.export({"ckpt_dir": "ckpt", "filter_sparse_opt": True, "events": "events.jsonl", **config})
    told = [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]
    assert [event["uri"] for event in told if event["event"] == "registered"] == [f"models:/{name}/1"]
    made = client.get_model_version(name, "1")
    assert Path(made.source).is_relative_to(tmp_path / ("packages" if is_placed else "out/m1"))
    assert made.tags["dist_export.source"] == str(checkpoint)
    monkeypatch.chdir("/")
    assert verify(base.resolve(f"models:/{name}/1", {}).directory).findings == []


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("ctr/5", "give the name alone: models:/ctr"),
        ("ctr@champion", "give the name alone"),
        ("", "is no URI of MLflow"),
    ],
)
@pytest.mark.parametrize("setting", ["register", "export_dir"])
def test_where_no_version_can_be_made_is_refused_before_the_export(
    client: Any, checkpoint: Path, tmp_path: Path, setting: str, end: str, message: str
) -> None:
    config = {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    options = {"registry_options": {"location": str(tmp_path / "out")}}
    with pytest.raises(ConfigError, match=message):
        exports.export({**config, **options, setting: f"models:/{end}"})
    assert not (tmp_path / "out").exists()


def test_a_package_with_credentials_in_its_url_is_not_registered(client: Any, checkpoint: Path) -> None:
    place = {"export_dir": "memory://me:hunter22@registered/out", "register": "models:/ctr"}
    with pytest.raises(ConfigError, match=r"memory://\*\*\*@registered/out has credentials in its URL") as caught:
        exports.export({"ckpt_dir": str(checkpoint), "filter_sparse_opt": True, **place})
    assert "hunter22" not in str(caught.value)


def test_a_place_is_asked_for_without_making_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="where do its packages go"):
        exports.export({"ckpt_dir": "x", "export_dir": "models:/ctr"})
    assert not list(tmp_path.iterdir())


def test_a_registry_without_an_address_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"sqlite:///{tmp_path}/mlflow.db.*MLFLOW_REGISTRY_URI.*registry_uri: ADDRESS"
    ):
        dist_export.open_package("models:/ctr/1")
    assert not list(tmp_path.iterdir())


def test_a_database_of_the_registry_gets_none_for_runs_beside_it(
    tmp_path: Path, database: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.search_registered_models()  # so that it is there
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"not found; the registry asked is {database}, as registry_options say"):
        dist_export.open_package("models:/nobody/1", registry_options={"registry_uri": database})
    assert not list(tmp_path.iterdir())


def test_an_address_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")

    def refuse(*_: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("dist_export.registry.mlflow._import_client", lambda: refuse)
    with pytest.raises(ConfigError, match=r"ConnectionError: nobody answers; .*https://\*\*\*@mlflow.example/"):
        dist_export.open_package(
            "models:/ctr/1", registry_options={"registry_uri": "https://me:hunter22@mlflow.example/"}
        )


def test_a_package_that_could_not_be_registered_is_whole_and_a_rerun_registers_it_alone(
    client: Any, name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "ckpt_dir": str(checkpoint),
        "export_dir": str(tmp_path / "out"),
        "register": f"models:/{name}",
        "filter_sparse_opt": True,
    }
    with monkeypatch.context() as broken:
        broken.setattr(MlflowRegistry, "register", lambda *_: (_ for _ in ()).throw(ConnectionError("gone away")))
        with pytest.raises(
            ExportError, match=r"whole and committed, but could not be registered .*gone away.*Run the same"
        ):
            exports.export(config)
    assert verify(str(tmp_path / "out")).findings == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    manifest = exports.export(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert client.get_model_version(name, "1").tags["dist_export.digest"] == manifest.digest
    assert not (tmp_path / "out" / ".dist_export").exists()


def test_a_live_model_that_could_not_be_registered_is_not_exported_again(
    client: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MlflowRegistry, "register", lambda *_: (_ for _ in ()).throw(ConnectionError("gone away")))
    exporter = exports.exporter(
        torchrec_shape.build_trained(),
        "sparse_arch",
        "dense_arch",
        None,
        None,
        tmp_path / "out",
        register=f"models:/{name}",
    )
    with pytest.raises(ExportError, match=r"could not be registered .*Register it by hand"):
        exporter.export()


def test_packages_of_a_live_model_never_share_a_place(client: Any, name: str, tmp_path: Path) -> None:
    settings = {"registry_options": {"location": str(tmp_path)}}
    places = {
        exports.exporter(
            torchrec_shape.build_trained(), "sparse_arch", "dense_arch", None, None, f"models:/{name}", **settings
        ).export()
        and client.get_model_version(name, str(version)).source
        for version in (1, 2)
    }
    assert len(places) == 2


def test_the_order_of_patterns_makes_another_package() -> None:
    first = {"a*": "float16", "*": "int8"}
    found = FoundCheckpoint("c", None, ())
    keys = {
        locate._key_of(
            dist_export.ExportConfig(ckpt_dir="c", export_dir="e", filter_sparse_opt=True, dtype=d), found, 0
        )
        for d in (first, dict(reversed(first.items())))
    }
    assert len(keys) == 2


def test_a_null_filter_and_its_value_for_the_format_are_one_package(toy: None, tmp_path: Path) -> None:
    """Its directory is chosen by the settings that count, so that a job with the value spelt out finds it."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 3}, num_parts=1))
    settings = {
        "ckpt_dir": str(tmp_path / "ckpt"),
        "export_dir": "mos:ctr",
        "registry_options": {"root": str(tmp_path)},
    }
    of_null, of_false, of_true = (
        locate.locate(dist_export.ExportConfig(**settings, filter_sparse_opt=value), needs_dense=False).export_dir
        for value in (None, False, True)
    )
    assert of_null == of_false != of_true


def test_a_package_is_registered_once(client: Any, name: str, database: str, tmp_path: Path) -> None:
    registry = MlflowRegistry(registry_uri=database)
    package = Registered(
        directory=str(tmp_path), source="somewhere", digest="xxh3:1", inputs=(), outputs=(), versions={}
    )
    assert registry.register(f"models:/{name}", package) == f"models:/{name}/1"
    assert registry.register(f"models:/{name}", package) == f"models:/{name}/1"
    assert registry.register(f"models:/{name}", package._replace(digest="xxh3:2")) == f"models:/{name}/2"


def test_a_registry_that_is_not_told_where_packages_go_says_how_to(client: Any, name: str, checkpoint: Path) -> None:
    config = {"ckpt_dir": str(checkpoint), "export_dir": f"models:/{name}", "filter_sparse_opt": True}
    with pytest.raises(
        ConfigError, match=r"registry_options: \{location: DIRECTORY\}, or the tag dist_export.location"
    ):
        exports.export(config)
    client.create_registered_model(name, tags={"dist_export.location": str(checkpoint.parent / "packages")})
    exports.export(config)
    assert Path(client.get_model_version(name, "1").source).parent == checkpoint.parent / "packages" / name


def test_mlflow_that_is_not_installed_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    monkeypatch.setitem(__import__("sys").modules, "mlflow.exceptions", None)
    with pytest.raises(ConfigError, match=r"pip install mlflow-skinny sqlalchemy alembic"):
        exports.export({"ckpt_dir": "models:/ctr/1", "export_dir": str(tmp_path / "out")})


class ToyMos:
    """A resolver as a team with Mos would write it: versions are directories below a root."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def resolve(self, uri: str) -> Resolved:
        name, _, rest = uri.partition("/")
        version = rest.removeprefix("version=") or max(path.name for path in (self._root / name).iterdir())
        if not (self._root / name / version).is_dir():
            raise ConfigError(f"{uri}: Mos has no version {version}")
        return Resolved(str(self._root / name / version), f"{name}/version={version}")

    def place(self, uri: str, *, key: str) -> str:
        return str(self._root / uri / key)

    def register(self, uri: str, package: Registered) -> str:
        (self._root / f"{uri}.registered").write_text(package.digest)
        return f"{uri}/version={Path(package.directory).name}"


def install(monkeypatch: pytest.MonkeyPatch, scheme: str, resolver: type) -> None:
    """As if a package with this entry point were installed."""
    real = importlib.metadata.entry_points
    entry = SimpleNamespace(
        name=scheme, value=f"tests.integration.test_registries:{resolver.__name__}", load=lambda: resolver
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **given: [*real(**given), *([entry] if given else [])]
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "mos", ToyMos)


def read_documented_resolver() -> type:
    """Return the class that docs/registries.md shows."""
    text = (ROOT / "docs" / "registries.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    return names["Shelf"]


def test_the_documented_resolver_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "shelf", read_documented_resolver())
    write_checkpoint(tmp_path / "shelf" / "ctr" / "3", make_tables({"t": 3}, num_parts=1))
    monkeypatch.chdir(tmp_path)
    settings = ["--filter_sparse_opt=true", "--registry_options={shelf: {root: shelf}}", "--export_dir=shelf:/serving"]
    assert cli.main([*settings, "--ckpt_dir=shelf:/ctr/4"]) == 2
    assert "shelf:/ctr/4: the shelf shelf has no such version" in capsys.readouterr().err
    assert cli.main([*settings, "--ckpt_dir=shelf:/ctr/3"]) == 0
    uri, directory, digest = (tmp_path / "shelf" / "versions.txt").read_text().split()
    assert Path(directory).parent == tmp_path / "shelf" / "serving"
    package = dist_export.open_package(uri, registry_options={"root": "shelf"})
    assert (package.manifest.digest, package.manifest.source.uri) == (digest, "shelf:/ctr/3")


def test_each_registry_gets_the_options_under_its_scheme(
    client: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one registry to another, each with an option that the other does not take."""
    install(monkeypatch, "shelf", read_documented_resolver())
    write_checkpoint(tmp_path / "ctr" / "3", make_tables({"t": 3}, num_parts=1))
    config = {"ckpt_dir": "shelf:/ctr/3", "export_dir": f"models:/{name}", "filter_sparse_opt": True}
    options = {"shelf": {"root": str(tmp_path)}, "models": {"location": str(tmp_path / "packages")}}
    exports.export({**config, "registry_options": options})
    assert Path(client.get_model_version(name, "1").source).parent == tmp_path / "packages" / name
    with pytest.raises(ConfigError, match=r"unexpected keyword .*'root'.*registry_options: \{models: \{...\}\}"):
        exports.export({**config, "registry_options": {"root": str(tmp_path), "models": options["models"]}})


class Faulty:
    """A resolver with a bug."""

    def resolve(self, uri: str) -> Resolved:
        return {}[uri.rpartition("/")[2]]

    def place(self, uri: str, *, key: str) -> str:
        return {}["place"]

    def check(self, uri: str) -> None:
        return {}["check"]

    register = place


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ckpt_dir", "faulty:/ctr/3 cannot be resolved: KeyError: '3'"),
        ("export_dir", "faulty:/ctr/3: its registry has no place for a package: KeyError: 'place'"),
        ("register", "faulty:/ctr/3: its registry makes no version there: KeyError: 'check'"),
    ],
)
def test_what_a_resolver_raises_is_told_with_its_type(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    install(monkeypatch, "faulty", Faulty)
    config = {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    with pytest.raises(ConfigError) as caught:
        exports.export({**config, setting: "faulty:/ctr/3"})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "model:/ctr",
            "no registry is called model,.*did you mean models:\\?.*registries models, versions and the stores .*s3, ",
        ),
        ("runs:/abc/model", "no registry is called runs,"),
        ("nope://bucket/x", "no registry is called nope,"),
        ("s3:/bucket/x", "a store's URL has two slashes: s3://bucket/x$"),
    ],
)
@pytest.mark.parametrize("setting", ["ckpt_dir", "export_dir", "register"])
def test_a_slip_in_a_scheme_is_no_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, uri: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"ckpt_dir": str(checkpoint), "export_dir": "out", "filter_sparse_opt": True}
    with pytest.raises(ConfigError, match=message):
        exports.export({**config, setting: uri})
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_directory_may_be_called_like_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("./model:/ctr", "file:/tmp/ctr", "memory://ctr"):
        assert base.find_registry(path, {}) is None
    (tmp_path / "model:" / "ctr").mkdir(parents=True)
    assert base.find_registry("model:/ctr", {}) is None


def test_a_resolver_of_ones_own(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version in ("1", "2"):
        write_checkpoint(tmp_path / "model.ads.ctr" / version, make_tables({"t": int(version)}, num_parts=1))
    settings = [
        "--filter_sparse_opt=true",
        f"--registry_options.root={tmp_path}",
        "--ckpt_dir=model.ads.ctr",
        "--export_dir=model.ads.serving",
    ]
    assert cli.main(["plan", *settings]) == 0
    assert str(tmp_path / "model.ads.ctr" / "2") in capsys.readouterr().out
    assert cli.main(settings) == 0
    told = capsys.readouterr().out
    package = next((tmp_path / "model.ads.serving").iterdir())
    assert f"  version  model.ads.serving/version={package.name}" in told
    manifest = dist_export.open_package(package).manifest
    assert manifest.source.uri == "model.ads.ctr/version=2"
    assert (tmp_path / "model.ads.serving.registered").read_text() == manifest.digest
    assert cli.main([*settings[:2], "--ckpt_dir=model.ads.ctr/version=9", f"--export_dir={tmp_path / 'x'}"]) == 2
    assert "Mos has no version 9" in capsys.readouterr().err


def test_mos_without_a_resolver_says_how_to_plug_one_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--ckpt_dir=model.ads.ctr/version=3", f"--export_dir={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert 'project.entry-points."dist_export.registries"] mos = "your_package:YourResolver"' in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("models:/ctr/1", "models"),
        ("model.ads.ctr", "mos"),
        ("model.ads.ctr/version=3/ckpt_id=7", "mos"),
        ("s3://bucket/model.ads.ctr", "s3"),
        ("/data/model.ads.ctr", None),
        ("runs/ckpt_3", None),
        ("model.pt", None),
    ],
)
def test_which_registry_is_meant(uri: str, scheme: str | None) -> None:
    assert base.scheme_of(uri) == scheme


def test_a_directory_that_is_there_is_no_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ads.ctr").mkdir()
    assert base.scheme_of("model.ads.ctr") is None


def test_options_that_the_resolver_does_not_take(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MlflowRegistry cannot be used: .*locaton"):
        exports.export(
            {"ckpt_dir": "models:/ctr/1", "export_dir": str(tmp_path / "o"), "registry_options": {"locaton": "x"}}
        )


def test_register_must_name_a_registry(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/tmp/x is no URI of a registry; there are resolvers for models"):
        exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "o"), "register": "/tmp/x"})
    assert not (tmp_path / "o").exists()

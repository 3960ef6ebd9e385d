"""docker-compose.yml: valid against the Compose specification, and sound where a schema cannot see.

``docker compose config`` needs Docker; what it checks beyond the schema is checked here instead:
interpolation, and that everything a service refers to exists.
"""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
PORT = re.compile(
    r"((?P<ip>\d+(\.\d+){3}|\[[\da-f:]+\]):)?((?P<host>\d+):)?(?P<container>\d+)(/(tcp|udp))?"
)
VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$)|\{(?P<braced>\w+)(?:(?P<operator>:?[-?+])(?P<word>[^}]*))?\}|(?P<bare>\w+))"
)
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


class Missing(LookupError):
    """A variable without a value and without a default."""


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """Return ``text`` with Compose's ``${VAR}``, ``:-``, ``:?``, ``:+`` and ``$$`` filled in."""

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        name = match["braced"] or match["bare"]
        operator, word = match["operator"] or "", match["word"] or ""
        given = environment.get(name)
        if operator.startswith(":") and given == "":
            given = None
        if operator.endswith("+"):
            return word if given is not None else ""
        if given is not None:
            return given
        if operator.endswith("-"):
            return word
        raise Missing(f"{name}: {word}" if operator.endswith("?") else f"{name} has no default")

    return VARIABLE.sub(value, text)


def secrets_of(text: str) -> dict[str, str]:
    """Return the variables that must be given (``:?``), each with its message."""
    found = VARIABLE.finditer(text)
    return {m["braced"]: m["word"] for m in found if (m["operator"] or "").endswith("?")}


def load(text: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the document as Compose sees it: parsed, merged, then interpolated."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return interpolate(node, environment) if isinstance(node, str) else node

    return walk(yaml.safe_load(text))


def problems(document: Mapping[str, Any], root: Path) -> list[str]:
    """Return what ``docker compose config`` would refuse, and a few things it should."""
    services = document["services"]
    found = [
        f"{name}: {problem}"
        for name, service in services.items()
        for problem in (
            *dangling(service, document),
            *bad_dependencies(name, services),
            *bad_ports(service),
            *bad_build(service, root),
        )
    ]
    published = [
        port["host"] for s in services.values() for port in map(parsed, s.get("ports", ())) if port
    ]
    found += [f"port {p} is published twice" for p in set(published) if published.count(p) > 1]
    return found


def dangling(service: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("networks", "secrets", "configs"):
        for entry in service.get(kind, ()):
            name = entry["source"] if isinstance(entry, dict) else entry
            if name not in document.get(kind, {}) and (kind, name) != ("networks", "default"):
                yield f"refers to an undefined entry of {kind}, {name!r}"
    for mount in service.get("volumes", ()):
        if isinstance(mount, str):
            source = mount.split(":")[0] if ":" in mount else "/"
            named = not source.startswith((".", "/", "~"))
        else:
            source, named = mount.get("source"), mount["type"] == "volume"
        if named and source not in document.get("volumes", {}):
            yield f"refers to an undefined volume, {source!r}"


def bad_dependencies(name: str, services: Mapping[str, Any]) -> Iterator[str]:
    for other, condition in dependencies(services[name]).items():
        if other not in services:
            yield f"depends on an undefined service, {other!r}"
        elif condition not in CONDITIONS:
            yield f"depends on {other} in an unknown condition, {condition!r}"
        elif condition == "service_healthy" and "healthcheck" not in services[other]:
            yield f"waits for {other} to be healthy, which has no healthcheck"
        elif services[other].get("profiles") and not services[name].get("profiles"):
            yield f"depends on {other}, which is started in a profile only"
    reached, waiting = set(), set(dependencies(services[name]))
    while waiting:
        other = waiting.pop()
        reached.add(other)
        waiting |= set(dependencies(services.get(other, {}))) - reached
    if name in reached:
        yield "depends on itself"


def dependencies(service: Mapping[str, Any]) -> dict[str, str]:
    given = service.get("depends_on", {})
    if isinstance(given, list):
        return dict.fromkeys(given, "service_started")
    return {name: entry["condition"] for name, entry in given.items()}


def parsed(port: Any) -> re.Match[str] | None:
    return PORT.fullmatch(str(port))


def bad_ports(service: Mapping[str, Any]) -> Iterator[str]:
    for text in service.get("ports", ()):
        port = parsed(text)
        if not port:
            yield f"port {text!r} does not read [IP:][HOST:]CONTAINER"
        elif not all(0 < int(p) < 65536 for p in (port["host"] or 1, port["container"])):
            yield f"port {text!r} is out of range"


def bad_build(service: Mapping[str, Any], root: Path) -> Iterator[str]:
    build = service.get("build")
    if build is None:
        if "image" not in service:
            yield "has neither an image nor a build"
        return
    context = root / (build if isinstance(build, str) else build.get("context", "."))
    if not context.is_dir():
        yield f"the build context {context} is no folder"
    elif isinstance(build, str) or "dockerfile_inline" not in build:
        name = "Dockerfile" if isinstance(build, str) else build.get("dockerfile", "Dockerfile")
        if not (context / name).is_file():
            yield f"there is no {name} in the build context"


@pytest.fixture(scope="module")
def text() -> str:
    return FILE.read_text("utf-8")


@pytest.fixture(scope="module")
def compose(text: str) -> dict[str, Any]:
    return load(text, {**dict.fromkeys(secrets_of(text), "given"), "WEFT_WORK": "/somewhere"})


@pytest.fixture(scope="module")
def dockerfile(compose: dict[str, Any]) -> str:
    return compose["services"]["coordinator"]["build"]["dockerfile_inline"]


def test_the_file_follows_the_compose_schema(compose: dict[str, Any]) -> None:
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(compose)] == []


def test_everything_that_a_service_refers_to_exists(compose: dict[str, Any]) -> None:
    assert problems(compose, ROOT) == []


def test_the_services_of_the_architecture_are_there(compose: dict[str, Any]) -> None:
    expected = {"postgres", "object-store", "ray-head", "ray-worker", "coordinator"}
    assert set(compose["services"]) == expected


def test_every_named_volume_is_used(compose: dict[str, Any]) -> None:
    mounts = [m for s in compose["services"].values() for m in s.get("volumes", ())]
    used = {m.split(":")[0] for m in mounts if isinstance(m, str)}
    assert set(compose["volumes"]) == used


def test_every_variable_has_a_default_or_a_message(text: str) -> None:
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    bare = [
        m[0]
        for m in VARIABLE.finditer(body)
        if not m["escaped"] and (m["operator"] not in (":-", ":?") or not m["word"])
    ]
    assert bare == []


def test_no_secret_has_a_default(text: str) -> None:
    secret = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY")
    services = yaml.safe_load(text)["services"].values()
    settings = {k: v for s in services for k, v in s.get("environment", {}).items()}
    secrets = {k: v for k, v in settings.items() if secret.search(k)}
    assert secrets
    assert {k: v for k, v in secrets.items() if ":?" not in v} == {}


def test_a_forgotten_secret_is_refused_with_its_message(text: str) -> None:
    given = dict.fromkeys(secrets_of(text), "given")
    for name, message in secrets_of(text).items():
        with pytest.raises(Missing, match=re.escape(f"{name}: {message}")):
            load(text, {**given, name: ""})


def test_ports_are_published_on_this_host_only(compose: dict[str, Any]) -> None:
    ports = [p for s in compose["services"].values() for p in s.get("ports", ())]
    assert ports
    assert [p for p in ports if not p.startswith("127.0.0.1:")] == []


def test_every_image_is_pinned(compose: dict[str, Any]) -> None:
    images = [s["image"] for s in compose["services"].values()]
    assert [i for i in images if not re.search(r":v?\d", i)] == []


def test_the_image_carries_the_version_of_the_project(compose: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert compose["services"]["coordinator"]["image"] == f"weft:{version}"


def test_every_long_running_service_has_a_healthcheck(compose: dict[str, Any]) -> None:
    servers = {n: s for n, s in compose["services"].items() if s.get("restart")}
    assert set(servers) == {"postgres", "object-store", "ray-head", "ray-worker"}
    assert [n for n, s in servers.items() if "healthcheck" not in s] == []


def test_ray_nodes_demand_a_token(compose: dict[str, Any]) -> None:
    for name in ("ray-head", "ray-worker", "coordinator"):
        environment = compose["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"] == "given"


def test_workers_can_be_scaled(compose: dict[str, Any]) -> None:
    worker = compose["services"]["ray-worker"]
    assert not {"container_name", "ports"} & set(worker)


def test_the_dockerfile_copies_only_what_exists(dockerfile: str) -> None:
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
    sources = [name for line in copied for name in line.split()]
    assert {"strategies", "storage", "clients", "orchestrator"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_the_image_does_not_run_as_root(dockerfile: str) -> None:
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1] == "weft"


def test_the_python_of_the_image_is_one_that_the_project_supports(dockerfile: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    python = re.match(r"FROM python:([\d.]+)", dockerfile)
    assert python
    assert python[1] in SpecifierSet(project["requires-python"])


def test_the_image_installs_from_the_pins_and_known_extras(dockerfile: str) -> None:
    installs = re.findall(r"pip install ([^&\n]+)", dockerfile)
    assert installs
    assert [i for i in installs if "-c constraints.txt" not in i] == []
    extras = re.search(r"'\.\[([\w,]+)\]'", dockerfile)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_shell_variables_of_the_image_survive_interpolation(dockerfile: str) -> None:
    assert '--extra-index-url "$TORCH_INDEX"' in dockerfile


SOUND: dict[str, Any] = {
    "services": {
        "db": {"image": "db:1", "healthcheck": {}, "volumes": ["data:/data"]},
        "web": {
            "image": "web:1",
            "ports": ["127.0.0.1:80:80"],
            "depends_on": {"db": {"condition": "service_healthy"}},
        },
    },
    "volumes": {"data": None},
}


def changed(service: str, **entries: Any) -> dict[str, Any]:
    services = {**SOUND["services"], service: {**SOUND["services"][service], **entries}}
    return {**SOUND, "services": services}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (changed("web", volumes=["lost:/x"]), "web: refers to an undefined volume, 'lost'"),
        (
            changed("web", volumes=[{"type": "volume", "source": "lost", "target": "/x"}]),
            "web: refers to an undefined volume, 'lost'",
        ),
        (
            changed("web", networks=["lost"]),
            "web: refers to an undefined entry of networks, 'lost'",
        ),
        (
            changed("web", secrets=[{"source": "lost"}]),
            "web: refers to an undefined entry of secrets, 'lost'",
        ),
        (changed("web", depends_on=["lost"]), "web: depends on an undefined service, 'lost'"),
        (
            changed("web", depends_on={"db": {"condition": "tired"}}),
            "web: depends on db in an unknown condition, 'tired'",
        ),
        (
            changed("db", depends_on={"web": {"condition": "service_healthy"}}),
            "db: waits for web to be healthy, which has no healthcheck",
        ),
        (changed("db", depends_on=["web"]), "db: depends on itself"),
        (
            changed("db", profiles=["extra"]),
            "web: depends on db, which is started in a profile only",
        ),
        (changed("web", ports=["80:http"]), "web: port '80:http' does not read"),
        (changed("web", ports=["99999:80"]), "web: port '99999:80' is out of range"),
        (changed("db", ports=["80:5432"]), "port 80 is published twice"),
        (changed("web", build={"context": "lost"}), "is no folder"),
        (changed("web", build={"context": "tests"}), "web: there is no Dockerfile"),
    ],
)
def test_a_broken_file_is_found_out(document: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in problems(document, ROOT)), problems(document, ROOT)


def test_a_sound_file_has_no_problems() -> None:
    assert problems(SOUND, ROOT) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A ${A}", "1 1"),
        ("${B:-x} ${EMPTY:-x} ${EMPTY-x}", "x x "),
        ("${A:+set} ${B:+set}", "set "),
        ("$$A $${A}", "$A ${A}"),
    ],
)
def test_interpolation_follows_compose(text: str, expected: str) -> None:
    assert interpolate(text, {"A": "1", "EMPTY": ""}) == expected


def test_docker_itself_accepts_the_file(text: str) -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    given = {**dict.fromkeys(secrets_of(text), "given"), "WEFT_WORK": str(ROOT)}
    done = subprocess.run(
        [docker, "compose", "--file", FILE, "config", "--quiet"],
        env={"PATH": str(Path(docker).parent), **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

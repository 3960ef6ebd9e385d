"""docker-compose.yml: valid against the Compose specification, and sound where a schema cannot see.

``docker compose config`` needs Docker; what it checks beyond the schema is checked here instead:
interpolation, and that everything a service refers to exists.
"""

import itertools
import json
import re
import shutil
import subprocess
import sysconfig
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
DOCKERFILE = ROOT / "orchestrator" / "deployment" / "Dockerfile"
CADDYFILE = DOCKERFILE.with_name("Caddyfile")
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
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return DOCKERFILE.read_text("utf-8")


def test_the_file_follows_the_compose_schema(compose: dict[str, Any]) -> None:
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text("utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(compose)] == []


def test_everything_that_a_service_refers_to_exists(compose: dict[str, Any]) -> None:
    assert problems(compose, ROOT) == []


def test_the_services_of_the_architecture_are_there(services: dict[str, Any]) -> None:
    kept = {"postgres", "object-store", "object-store-folder", "ray-head", "ray-worker"}
    assert set(services) == kept | {"superlink", "proxy", "coordinator", "site-north", "site-south"}


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return where each volume or folder is mounted, by what it is."""
    given = [m if isinstance(m, dict) else m.split(":") for m in service.get("volumes", ())]
    return dict((m["source"], m["target"]) if isinstance(m, dict) else m[:2] for m in given)


def test_every_named_volume_and_secret_is_used(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    used = {name for s in services for name in mounts(s) if not name.startswith((".", "/"))}
    assert set(compose["volumes"]) == used
    assert set(compose["secrets"]) == {name for s in services for name in s.get("secrets", ())}


def test_every_variable_has_a_default_or_a_message(text: str) -> None:
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    bare = [
        m[0]
        for m in VARIABLE.finditer(body)
        if not m["escaped"] and (m["operator"] not in (":-", ":?") or not m["word"])
    ]
    assert bare == []


def test_secrets_come_by_file_and_have_no_default(compose: dict[str, Any], text: str) -> None:
    given = {name: entry["file"] for name, entry in compose["secrets"].items()}
    assert given
    assert {n: f for n, f in given.items() if not f.startswith("given/")} == {}
    assert "${WEFT_SECRETS:-" not in text
    secret = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY")
    environments = [s.get("environment", {}) for s in compose["services"].values()]
    settings = {k: v for e in environments for k, v in e.items() if secret.search(k)}
    assert settings
    assert {k: v for k, v in settings.items() if not v.startswith("/run/secrets/")} == {}


def test_a_service_reads_the_secrets_that_it_is_given_and_no_others(
    services: dict[str, Any],
) -> None:
    for name, service in services.items():
        kept = {k: service.get(k) for k in ("environment", "entrypoint", "command")}
        read = set(re.findall(r"/run/secrets/(\w+)", json.dumps(kept)))
        by_node_yaml = {"proxy_authority"} if name.startswith("site-") else set()
        assert read | by_node_yaml == set(service.get("secrets", ())), name


def test_a_forgotten_variable_is_refused_with_its_message(text: str) -> None:
    given = dict.fromkeys(secrets_of(text), "given")
    assert {"WEFT_SECRETS", "WEFT_WORK", "WEFT_PROXY_NAME"} == set(given)
    for name, message in secrets_of(text).items():
        with pytest.raises(Missing, match=re.escape(f"{name}: {message}")):
            load(text, {**given, name: ""})


def test_only_the_proxy_is_published_and_to_this_host_only(services: dict[str, Any]) -> None:
    ports = {name: s["ports"] for name, s in services.items() if "ports" in s}
    assert ports == {"proxy": ["127.0.0.1:443:8443"]}


def test_a_coordinator_finds_the_superlink_by_its_name_and_has_its_files(
    services: dict[str, Any],
) -> None:
    """What the SuperLink notes of its address is of its own machine."""
    coordinator, superlink = services["coordinator"], services["superlink"]
    host, _, port = coordinator["environment"]["WEFT_SUPERLINK"].partition(":")
    told = dict(itertools.pairwise(superlink["command"]))
    assert (host, port) == (told["--name"], told["--port"])
    assert set(coordinator["networks"]) & set(superlink["networks"])
    assert mounts(coordinator)["superlink"] == mounts(superlink)["superlink"]


def test_a_site_reaches_the_proxy_alone_and_the_proxy_the_superlink_alone(
    compose: dict[str, Any],
) -> None:
    inside: dict[str, set[str]] = {name: set() for name in compose["networks"]}
    for name, service in compose["services"].items():
        assert "networks" in service or service["network_mode"] == "none", name
        for network in service.get("networks", ()):
            inside[network].add(name)
    assert inside["sites"] == {"site-north", "site-south", "proxy"}
    assert inside["exposed"] == {"proxy", "superlink"}
    assert inside["front"] == {"proxy"}
    assert "proxy" not in inside["core"]
    assert not {name for name in inside["core"] if name.startswith("site-")}
    closed = {n for n, e in compose["networks"].items() if (e or {}).get("internal")}
    assert closed == {"core", "exposed", "sites"}


def test_every_service_is_hardened(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service.get("cap_add", ())) <= {"NET_BIND_SERVICE", "CHOWN"}, name


def test_only_what_gives_a_folder_away_runs_as_root(services: dict[str, Any]) -> None:
    ours = {n for n, s in services.items() if "build" in s}  # as the Dockerfile says
    named = {n: s.get("user") for n, s in services.items() if n not in ours}
    assert {n for n, user in named.items() if user in (None, "root", "0")} == {
        "object-store-folder"
    }
    folder = services["object-store-folder"]
    assert (folder["network_mode"], folder["restart"]) == ("none", "no")
    assert folder["entrypoint"][0] == "chown"


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    images = [s["image"] for s in services.values()]
    assert [i for i in images if not re.search(r":v?\d", i)] == []


def test_the_images_carry_the_version_of_the_project(services: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    built = {s["image"]: s["build"]["target"] for s in services.values() if "build" in s}
    assert built == {f"weft:{version}": "coordinator", f"weft-site:{version}": "site"}


def test_every_long_running_service_has_a_healthcheck(services: dict[str, Any]) -> None:
    servers = {n: s for n, s in services.items() if s["restart"] != "no"}
    assert set(services) - set(servers) == {"coordinator", "object-store-folder"}
    assert [n for n, s in servers.items() if "healthcheck" not in s] == []


def test_ray_nodes_demand_a_token(services: dict[str, Any]) -> None:
    for name in ("ray-head", "ray-worker", "coordinator"):
        environment = services[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_the_proxy_is_given_what_its_caddyfile_asks_for(services: dict[str, Any]) -> None:
    proxy = services["proxy"]
    assert "./orchestrator/deployment/Caddyfile" in mounts(proxy)
    places = re.findall(r"\{\$(\w+)(:[^}]*)?\}", CADDYFILE.read_text("utf-8"))
    needed = {name for name, default in places if not default}
    assert needed
    assert needed <= set(proxy["environment"]) <= {name for name, _ in places}
    assert services["proxy"]["ports"][0].endswith(f":{proxy['environment']['WEFT_PROXY_PORT']}")


def test_workers_can_be_scaled(services: dict[str, Any]) -> None:
    assert not {"container_name", "ports"} & set(services["ray-worker"])


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def stages(dockerfile: str) -> dict[str, tuple[str, str]]:
    """Return from what each stage is built, and its text, by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", dockerfile, flags=re.MULTILINE)[1:]
    return {name: (source, text) for source, name, text in zip(*[iter(parts)] * 3, strict=True)}


def test_the_dockerfile_copies_only_what_exists_and_may_be_seen(dockerfile: str) -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert {"strategies", "storage", "clients", "orchestrator"} <= sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == sources


def test_the_images_do_not_run_as_root_and_hold_no_tools_to_build(dockerfile: str) -> None:
    found = stages(dockerfile)
    for target in ("site", "coordinator"):
        assert found[target][0] == "base"
        assert "pip install" not in found[target][1]
        assert "USER" not in found[target][1]
    assert re.findall(r"^USER (\S+)", found["base"][1], re.MULTILINE) == ["10001"]
    assert "--uid 10001 weft" in found["base"][1]


def test_the_image_of_a_site_has_no_database_driver(dockerfile: str) -> None:
    built = stages(dockerfile)
    extras = {name: re.findall(r"'\.\[([\w,]+)\]'", text) for name, (_, text) in built.items()}
    assert "--from=build " in built["site"][1]
    assert extras["build"] == ["parquet,hub"]
    assert extras["build-coordinator"] == ["parquet,hub,postgres,s3"]


def test_the_python_of_the_image_is_one_that_the_project_supports(dockerfile: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pythons = set(re.findall(r"^FROM python:([\d.]+)", dockerfile, re.MULTILINE))
    assert len(pythons) == 1  # a virtual environment moves between images of the same
    assert pythons.pop() in SpecifierSet(project["requires-python"])


def test_the_image_installs_from_the_pins_and_known_extras(dockerfile: str) -> None:
    installs = re.findall(r"pip install ([^&\n]+)", dockerfile)
    assert installs
    loose = [i for i in installs if "-c constraints.txt" not in i and "--require-hashes" not in i]
    assert loose == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extras in re.findall(r"'\.\[([\w,]+)\]'", dockerfile):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_demo_model_of_the_image_is_the_makefile_s(dockerfile: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for name in ("DEMO_MODEL", "DEMO_MODEL_HASH"):
        wanted = re.search(rf"^{name} := (\S+)$", makefile, re.MULTILINE)
        assert wanted
        assert f"ARG {name}={wanted[1]}\n" in dockerfile


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

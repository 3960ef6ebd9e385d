"""Which SuperLink a coordinator uses."""

import subprocess
import sys

import pytest

from orchestrator.sections import BackendConfig
from orchestrator.superlink_home import NoSuperLink, SuperLinkHome, is_loopback, superlink_of


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("WEFT_SUPERLINK", "WEFT_SUPERLINK_CA", "WEFT_SUPERLINK_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path):
    """Return a home in which a SuperLink was started once."""
    own = SuperLinkHome.of(tmp_path)
    own.folder.mkdir()
    own.secret.write_bytes(b"of the home")
    own.address.write_text("http://127.0.0.1:9092\n")
    own.database.touch()
    return tmp_path


def used(home, **chosen):
    link = superlink_of(home, BackendConfig(name="superlink", **chosen))
    link.close()
    return link.endpoint.address, link.endpoint.plain, link.secret, link.database


def test_the_home_s_own_is_used_where_no_other_is_named(home):
    database = SuperLinkHome.of(home).database
    assert used(home) == ("127.0.0.1:9092", True, b"of the home", database)
    SuperLinkHome.of(home).address.write_text("127.0.0.1:9092")
    assert used(home) == ("127.0.0.1:9092", False, b"of the home", database)


def test_the_environment_goes_before_the_home_and_the_run_before_both(home, monkeypatch, tmp_path):
    (tmp_path / "other").write_bytes(b"of another")
    monkeypatch.setenv("WEFT_SUPERLINK", "link.example.org:443")
    monkeypatch.setenv("WEFT_SUPERLINK_SECRET_FILE", str(tmp_path / "other"))
    assert used(home) == ("link.example.org:443", False, b"of another", None)

    assert used(home, superlink="[::1]:9093")[0] == "[::1]:9093"


def test_without_any_it_is_said_how_to_get_one(tmp_path):
    with pytest.raises(NoSuperLink, match="weft superlink start, or name one"):
        superlink_of(tmp_path)


def test_plain_http_stays_on_this_machine(home):
    with pytest.raises(NoSuperLink, match="is on another machine"):
        used(home, superlink="http://10.0.0.1:9092")


@pytest.mark.parametrize("content", [None, b""])
def test_a_secret_that_is_missing_is_named(home, content):
    path = SuperLinkHome.of(home).secret
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(NoSuperLink, match=str(path)):
        used(home)


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("127.8.8.8:1", True),
        ("0.0.0.0:1", False),
        ("10.1.2.3:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_which_addresses_are_this_machine_s_alone(address, own):
    assert is_loopback(address) == own


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "ray", "superlink": "x:1"}, "superlink: it is of name: superlink, got ray"),
        ({"name": "inline", "local": "ray"}, "local: it is of name: superlink, got inline"),
        ({"name": "superlink", "superlink": "x"}, "superlink"),
        ({"name": "superlink", "address": "head:6379"}, "address: inline runs in this process"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        BackendConfig(**options)


def test_what_needs_no_site_is_done_where_local_says():
    assert BackendConfig(name="superlink").here == "inline"
    assert BackendConfig(name="superlink", local="ray", address="head:6379").here == "ray"
    assert BackendConfig().here == "ray"


def test_who_lets_keys_in_loads_no_torch():
    used = "orchestrator.backends.superlink, orchestrator.superlink_server, orchestrator.node_keys"
    code = f"import sys, clients.node.running, {used}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"

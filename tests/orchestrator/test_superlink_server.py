"""How a home's SuperLink is started: where it may listen, its files and its certificates."""

import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from orchestrator.deployment.certificates import Names, make_certificates
from orchestrator.superlink_home import SuperLinkHome
from orchestrator.superlink_server import (
    BadListening,
    Listening,
    SuperLinkFailed,
    SuperLinkServer,
    only_one,
)


def server(home, **listening):
    return SuperLinkServer(SuperLinkHome.of(home), Listening(**listening), threading.Event())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"host": "8.8.8.8"}, "is reached by the whole world"),
        ({"host": "2001:4860::1"}, "is reached by the whole world"),
        ({"host": "superlink"}, "--host is an address of this machine"),
        ({"port": 0}, "--port must be between 1 and 65535, got 0"),
        ({"names": ("a\x07b\nc",)}, r"--name must be a host name .*, got 'a\\x07b\\nc'"),
        ({"names": ("ü.example.org",)}, "--name must be a host name"),
        ({"certificate": "c.pem"}, "needs all of --certificate, --key and --authority"),
    ],
)
def test_where_it_must_not_listen_it_is_not_started(options, problem):
    with pytest.raises(BadListening, match=problem):
        Listening(**options)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:9092"),
        ("10.1.2.3", "10.1.2.3:9092"),
        ("0.0.0.0", "127.0.0.1:9092"),
        ("::1", "[::1]:9092"),
    ],
)
def test_this_machine_dials_what_it_listens_on(host, address):
    assert Listening(host).address == address


def test_what_is_secret_is_its_owner_s_alone_and_stays(tmp_path):
    old = os.umask(0)
    try:
        server(tmp_path).prepare()
    finally:
        os.umask(old)
    own = SuperLinkHome.of(tmp_path)
    tls = own.authority.parent
    secret = own.secret.read_bytes()

    for path in (own.secret, tls / "ca.key", tls / "server.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.folder.stat().st_mode) == 0o700
    assert len(secret) >= 32
    before = [path.read_bytes() for path in sorted(tls.iterdir())]
    server(tmp_path).prepare()
    assert own.secret.read_bytes() == secret
    assert [path.read_bytes() for path in sorted(tls.iterdir())] == before


def test_it_is_started_closed(tmp_path):
    own = SuperLinkHome.of(tmp_path)
    started = server(tmp_path, port=9093)

    words = started.command(started.prepare())

    def option(name):
        return words[words.index(name) + 1]

    assert (option("--host"), option("--port")) == ("127.0.0.1", "9093")
    assert option("--isolation") == "process"
    assert option("--superexec-auth-secret-file") == str(own.secret)
    assert option("--database") == str(own.database)
    assert "--enable-supernode-auth" in words
    assert "--insecure" not in words
    assert own.secret.read_text() not in words
    assert own.address.read_text() == "127.0.0.1:9093"


def subjects(path):
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_a_certificate_is_signed_by_the_authority_and_for_the_names(tmp_path):
    certificate, key, authority = make_certificates(tmp_path, Names(("link.example.org",)))

    assert subjects(certificate) == ["localhost", "127.0.0.1", "::1", "link.example.org"]
    inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialing = ssl.create_default_context(cafile=str(authority)).wrap_bio(
        inside, outside, server_hostname="link.example.org"
    )
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(certificate, key)
    answering = listening.wrap_bio(outside, inside, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        dialing.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        answering.do_handshake()
    dialing.do_handshake()  # it believes the certificate


def test_for_other_names_another_certificate_is_made_by_the_same_authority(tmp_path):
    _, _, authority = make_certificates(tmp_path, Names())
    signer = authority.read_bytes()
    certificate, _, _ = make_certificates(tmp_path, Names(("10.0.0.7",)))

    assert subjects(certificate)[-1] == "10.0.0.7"
    assert authority.read_bytes() == signer


def believed(certificate, authority):
    signer = x509.load_pem_x509_certificate(authority.read_bytes())
    x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(signer)


def test_after_a_given_authority_the_home_s_own_is_made_anew(tmp_path):
    own = server(tmp_path).prepare()
    certificate, key, authority = make_certificates(tmp_path / "given", Names())
    server(tmp_path, certificate=certificate, key=key, authority=authority).prepare()
    assert own[2].read_bytes() == authority.read_bytes()

    again = server(tmp_path).prepare()

    assert again == own
    believed(own[0], own[2])


def test_a_key_without_its_certificate_is_not_used(tmp_path):
    certificate, key, authority = make_certificates(tmp_path / "a", Names())
    other = make_certificates(tmp_path / "b", Names())
    key.write_bytes(other[1].read_bytes())  # a crash left what was to be the next one

    make_certificates(tmp_path / "a", Names())

    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    believed(certificate, authority)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path):
    certificate, key, authority = make_certificates(tmp_path / "made", Names())
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hidden"),
        )
    )

    with pytest.raises(BadListening, match="are no certificate, its key"):
        server(tmp_path, certificate=certificate, key=key, authority=authority).prepare()


def test_a_ledger_that_is_locked_does_not_end_the_superlink(tmp_path, caplog):
    stop, steps = threading.Event(), []
    started = SuperLinkServer(SuperLinkHome.of(tmp_path), Listening(), stop)

    def step():
        steps.append(1)
        stop.set()
        raise sqlite3.OperationalError("database is locked")

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started._child = child
        started._tend(step)
        child.kill()

    assert steps == [1]
    assert "database is locked" in caplog.text


def test_given_certificates_are_used_and_their_authority_is_known_to_the_home(tmp_path):
    certificate, key, authority = make_certificates(tmp_path / "made", Names())

    given = {"certificate": certificate, "key": key, "authority": authority}
    files = server(tmp_path, **given).prepare()

    assert files == (certificate, key, authority)
    assert SuperLinkHome.of(tmp_path).authority.read_bytes() == authority.read_bytes()


def test_a_key_of_another_certificate_is_refused(tmp_path):
    certificate, _, authority = make_certificates(tmp_path / "one", Names())
    _, key, _ = make_certificates(tmp_path / "other", Names())

    with pytest.raises(BadListening, match="give PEM files of one another"):
        server(tmp_path, certificate=certificate, key=key, authority=authority).prepare()


def test_a_port_that_is_taken_is_told_at_once_and_nothing_is_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = server(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(SuperLinkFailed, match=r"already in use.*another --port"):
            started.serve(lambda link: None)

    assert not list(tmp_path.iterdir())


def test_a_home_has_one_superlink(tmp_path):
    own = SuperLinkHome.of(tmp_path)
    with only_one(own), pytest.raises(SuperLinkFailed, match="runs already"), only_one(own):
        pass
    with only_one(own):
        pass

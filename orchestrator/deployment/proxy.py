"""The reverse proxy's configuration, which comes with weft, with a deployment's values in it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_PLACE = re.compile(r"\{\$(?P<name>\w+)(?::(?P<default>[^}]*))?\}")
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_EMAIL = re.compile(r"[^\s@{}\"'`\\]+@[^\s@{}\"'`\\]+")
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


class BadProxy(ValueError):
    """A value that a proxy cannot be configured with."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """How the world reaches a SuperLink.

    Attributes:
        names: host names or addresses that sites dial.
        tls: a certificate's file and its key's, or one e-mail address for certificates by ACME.
        superlink: ``HOST:PORT`` of the SuperLink, which speaks TLS itself.
        authority: file of who signed the SuperLink's own certificate.
        port: that sites dial.
        bind: address to listen on.
    """

    names: tuple[str, ...]
    tls: tuple[str, ...]
    superlink: str
    authority: Path
    port: int = 443
    bind: str = "0.0.0.0"

    def __post_init__(self) -> None:
        for name in self.names:
            _check(is_host(name), "name", name, "a host name in lower case, or an address")
        if not self.names:
            raise BadProxy("the proxy has no name; name the host that sites dial, by --name")
        if len(self.tls) == 1:
            _check(_EMAIL.fullmatch(self.tls[0]), "--acme", self.tls[0], "an e-mail address")
        found = _ADDRESS.fullmatch(self.superlink)
        valid = found and 0 < int(found["port"]) < 65536
        _check(valid, "--superlink", self.superlink, "HOST:PORT, such as 127.0.0.1:9092")
        _check(0 < self.port < 65536, "--port", str(self.port), "1 to 65535")
        _check(_is_address(self.bind), "--bind", self.bind, "an address, such as 10.0.0.1")

    def variables(self) -> Mapping[str, str]:
        """Return the values by the names of the places that they go into."""
        tls = self.tls if len(self.tls) == 1 else [_quoted(file) for file in self.tls]
        return {
            "WEFT_PROXY_NAME": " ".join(self.names),
            "WEFT_PROXY_PORT": str(self.port),
            "WEFT_PROXY_BIND": self.bind,
            "WEFT_PROXY_TLS": " ".join(tls),
            "WEFT_SUPERLINK": self.superlink,
            "WEFT_SUPERLINK_CA": _quoted(str(self.authority)),
        }


def shipped() -> str:
    """Return the Caddyfile as it is shipped, with places for values."""
    return files("orchestrator.deployment").joinpath("Caddyfile").read_text("utf-8")


def caddyfile(exposure: Exposure) -> str:
    """Return the Caddyfile of one deployment, which needs no environment any more."""
    values = exposure.variables()

    def value(place: re.Match[str]) -> str:
        return values.get(place["name"], place["default"] or "")

    return _PLACE.sub(value, shipped())


def _quoted(path: str) -> str:
    """Return a path as a word of a Caddyfile.

    Raises:
        BadProxy: if it is none there.
    """
    _check(not re.search(r'["`{}\\\n\r]', path), "a file", path, "a path without quotes or braces")
    return f'"{path}"' if re.search(r"[\s#]", path) else path


def _check(holds: object, what: str, value: str, allowed: str) -> None:
    if not holds:
        raise BadProxy(f"{what} of the proxy must be {allowed}, got {value!r}")


def is_host(name: str) -> bool:
    """Return whether a name is one that a certificate can be for, or an address."""
    return bool(_NAME.fullmatch(name)) or _is_address(name)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True

"""A certificate authority of a SuperLink's own, and the SuperLink's certificate by it.

Who dials the SuperLink, a proxy and coordinators, is told whom to believe by file; the world dials
the proxy, whose certificate is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clients.files import write_durably

_AUTHORITY_FOR = timedelta(days=3650)
_CERTIFICATE_FOR = timedelta(days=397)
_RENEW_BEFORE = timedelta(days=60)
_EARLIER = timedelta(hours=1)  # clocks differ
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Names:
    """What a certificate is for.

    Attributes:
        more: host names and addresses besides this machine's own.
    """

    more: tuple[str, ...] = ()

    def subjects(self) -> list[x509.GeneralName]:
        """Return them as a certificate has them."""
        found: list[x509.GeneralName] = []
        for name in dict.fromkeys((*_LOCAL, *self.more)):
            try:
                found.append(x509.IPAddress(ip_address(name)))
            except ValueError:
                found.append(x509.DNSName(name))
        return found


def make_certificates(folder: Path, names: Names) -> tuple[Path, Path, Path]:
    """Return the files of a certificate, its key and its authority, made where need be.

    The authority stays; the certificate is made anew where it is for other names, or ends soon.

    Args:
        folder: of these files; the keys in it are readable by their owner alone.
        names: that the certificate is to be for.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, authority_key = folder / "ca.crt", folder / "ca.key"
    certificate, key = folder / "server.pem", folder / "server.key"
    if not _is_pair(authority, authority_key):
        certificate.unlink(missing_ok=True)
        authority.unlink(missing_ok=True)
        _make_authority(authority, authority_key)
    if not (_is_pair(certificate, key) and _is_good(certificate, names)):
        _make_certificate(certificate, key, (authority, authority_key), names)
    return certificate, key, authority


def _make_authority(certificate: Path, key: Path) -> None:
    private, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = _name("weft SuperLink authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    built = (
        _builder(name, name, private.public_key(), now + _AUTHORITY_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    _write_key(key, private)
    write_durably(certificate, built.public_bytes(serialization.Encoding.PEM))


def _make_certificate(
    certificate: Path, key: Path, authority: tuple[Path, Path], names: Names
) -> None:
    signer = x509.load_pem_x509_certificate(authority[0].read_bytes())
    signing = serialization.load_pem_private_key(authority[1].read_bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    public_key = signing.public_key()
    private, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    built = (
        _builder(
            _name("weft SuperLink"), signer.subject, private.public_key(), now + _CERTIFICATE_FOR
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names.subjects()), critical=False)
        .add_extension(server, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    _write_key(key, private)
    write_durably(certificate, built.public_bytes(serialization.Encoding.PEM))


def _is_pair(certificate: Path, key: Path) -> bool:
    """Return whether both are there, and the key is the certificate's.

    It is not after a crash between the two, or where another authority was given meanwhile.
    """
    if not (certificate.exists() and key.exists()):
        return False
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    return x509.load_pem_x509_certificate(certificate.read_bytes()).public_key() == (
        private.public_key()
    )


def _is_good(path: Path, names: Names) -> bool:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    return list(alternative.value) == names.subjects() and left > _RENEW_BEFORE


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _EARLIER)
        .not_valid_after(until)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    form = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_durably(path, pem)  # nobody else's to read

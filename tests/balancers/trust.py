"""Certificates for both sides: an authority, a stranger's, and what a server and its clients show each other."""

from __future__ import annotations

import datetime
import functools
import ssl

import trustme
from gevent.ssl import SSLContext

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
SERVER = "server.test"
OURS = "ours"


@functools.lru_cache(maxsize=2)
def authority(name: str) -> trustme.CA:
    """The authority of that name. Both sides trust `OURS`, and no other."""
    return trustme.CA(organization_name=name)


@functools.lru_cache(maxsize=16)
def certificate(name: str, *, signed_by: str = OURS, expired: bool = False) -> trustme.LeafCert:
    """A certificate for that name, from that authority."""
    now = datetime.datetime.now(datetime.timezone.utc)
    end = now - datetime.timedelta(days=1) if expired else now + datetime.timedelta(days=1)
    return authority(signed_by).issue_cert(
        name, common_name=name, not_before=now - datetime.timedelta(days=30), not_after=end
    )


def server_context(shown: trustme.LeafCert, version: ssl.TLSVersion | None = None) -> SSLContext:
    """A server's, which shows that and wants a certificate of our authority from each client."""
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    shown.configure_cert(context)
    return _finished(context, version)


def client_context(shown: trustme.LeafCert | None, version: ssl.TLSVersion | None = None) -> SSLContext:
    """A client's, which shows that, or nothing, and wants a certificate of our authority from the server."""
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if shown is not None:
        shown.configure_cert(context)
    return _finished(context, version)


def _finished(context: SSLContext, version: ssl.TLSVersion | None) -> SSLContext:
    authority(OURS).configure_trust(context)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context

"""Let in only those who have a certificate, and know who they are: mutual TLS below a session.

    python mutual_tls.py

Needs trustme (pip install trustme), which makes the certificates that your own authority would make. A server and its
clients run in this process: one client that the server knows, one without a certificate, one with a stranger's, and one
that expects another server. Prints what each of them is told.
"""

import ssl
import tempfile
from pathlib import Path

import trustme

# Not those of `ssl`: their sockets would block the whole process, unless gevent.monkey has patched it.
from gevent.ssl import SSLContext

import geyamux
from geyamux.server import StreamServer

SERVER, AGENT = "server.example", "agent-7.example"


def greet(stream, address):
    stream.sendall(f"hello {name_of_peer(stream.session)}".encode())


def name_of_peer(session):
    """Whom the peer's certificate names. That it is genuine was checked in the handshake."""
    return session.conn.getpeercert()["subjectAltName"][0][1]


def server_context(files):
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "server.pem")
    context.load_verify_locations(files / "authority.pem")
    context.verify_mode = ssl.CERT_REQUIRED  # this makes it mutual
    return context


def client_context(files, own=None):
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files / "authority.pem")
    if own is not None:
        context.load_cert_chain(files / own)
    return context


def visit(address, context, expected=SERVER):
    """What a client with this context is told."""
    try:
        session = geyamux.connect(address, timeout=10, ssl_context=context, server_hostname=expected)
        with session, session.open() as stream:
            return f"{name_of_peer(session)} says {stream.read().decode()}"
    except ssl.SSLError as error:
        return f"refused in the handshake: {error.reason}"
    except geyamux.SessionError as error:
        # TLS 1.3: a client is done with the handshake before the server has looked at its certificate.
        return f"the session ended: {getattr(error.__cause__, 'reason', error)}"


def make_certificates(files):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(files / "authority.pem")
    authority.issue_cert(SERVER).private_key_and_cert_chain_pem.write_to_path(files / "server.pem")
    authority.issue_cert(AGENT).private_key_and_cert_chain_pem.write_to_path(files / "agent.pem")
    trustme.CA().issue_cert(AGENT).private_key_and_cert_chain_pem.write_to_path(files / "stranger.pem")


def main():
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        make_certificates(files)
        with StreamServer(("127.0.0.1", 0), greet, ssl_context=server_context(files)) as server:
            server.start()
            print("agent:", visit(server.address, client_context(files, "agent.pem")))
            print("nobody:", visit(server.address, client_context(files)))
            print("stranger:", visit(server.address, client_context(files, "stranger.pem")))
            print("lost:", visit(server.address, client_context(files, "agent.pem"), expected="elsewhere.example"))


main()

"""An adapter for requests: ``session.mount("yamux://", YamuxAdapter(source))`` sends requests over streams.

It opens a stream where requests would connect; all of HTTP, the pools, timeouts and retries are those of requests and
urllib3. It is imported by nobody but its user: requests (2.32.3 or later) is not a dependency of geyamux.

Two rules hold here. Which session carries a stream is decided anew for each stream, by `source`; the host in the URL
only chooses the pool and becomes the Host header. And nothing blocks the hub, with and without monkey-patching: where
urllib3 waits in a lock or sleeps, gevent does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit, uses_netloc, uses_relative

import gevent
from gevent.queue import LifoQueue
from requests import PreparedRequest, Response
from requests.adapters import DEFAULT_POOLBLOCK, DEFAULT_POOLSIZE, DEFAULT_RETRIES, HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from urllib3.util.retry import Retry

from .session import Session
from .stream import Stream

__all__ = ["YamuxAdapter"]

_DEFAULT_PORTS = {"http": 80, "https": 443}


class YamuxAdapter(HTTPAdapter):
    """Send the requests of a ``requests.Session`` over streams.

    `source` is a session, or a function without arguments that returns a live one. The function is called for each
    stream that is opened, by many greenlets at once; it may wait, and is the place to reconnect. The other arguments
    are those of ``requests.adapters.HTTPAdapter``: up to `pool_maxsize` idle streams are kept for each host, and with
    `pool_block` no more than that are in use at once.

    *Where to mount it.* At any prefix. With ``http://backend/`` or ``http+yamux://`` everything works as it does over
    TCP. For schemes that do not begin with http, ``yamux://`` for one, requests leaves the URL as it is: ``params=`` is
    lost, so write the query into the URL. Redirects are followed, relative ones and those to the same host over http or
    https, which is what the server takes itself for. At ``https://`` or ``https+yamux://`` there is TLS inside the
    stream, verified as ever (`verify`, `cert`). Proxies, those of the environment too, are not used.

    *Idle streams.* One on which something came, an end or an error among others, and one whose peer has gone away, is
    replaced before its next use.
    ``close()``, and so ``requests.Session.close()``, closes the idle streams; the geyamux session is its owner's.

    *Errors.* As over TCP. What `source` or ``open`` raises is a ``requests.ConnectionError``, or a
    ``requests.ConnectTimeout`` where they take longer than the connect timeout, and counts as a failed connection:
    ``max_retries=3`` tries again, whatever the method. A stream that was reset, or a session that broke, after the
    request was sent is a ``requests.ConnectionError`` (in the middle of a body ``ChunkedEncodingError``) and repeated
    only as ``urllib3.Retry`` is told to: never a POST by itself. Sending is limited by the connect timeout, waiting for
    bytes by the read timeout. A kill or a ``gevent.Timeout`` ends the stream and leaves the session alone.

    *Not guaranteed.* A subclass of ``Retry`` sleeps as it likes: with ``time.sleep`` and without monkey-patching that
    blocks the hub. Pickling needs a `source` that can be pickled: a function of a module, not a session.

    Raises ``TypeError`` for a `source` that is neither.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "_source"]  # noqa: RUF012  # what requests pickles

    def __init__(
        self,
        source: Session | Callable[[], Session],
        pool_connections: int = DEFAULT_POOLSIZE,
        pool_maxsize: int = DEFAULT_POOLSIZE,
        max_retries: int | Retry = DEFAULT_RETRIES,
        pool_block: bool = DEFAULT_POOLBLOCK,
    ) -> None:
        if not (isinstance(source, Session) or callable(source)):
            raise TypeError(f"a geyamux session or a function that returns one is needed, not {source!r}")
        #: A session, or what returns one.
        self._source = source
        super().__init__(pool_connections, pool_maxsize, max_retries, pool_block)

    @property
    def max_retries(self) -> Retry:
        """What is tried again, and how often."""
        # A property, because the base class and users set it.
        return self._max_retries

    @max_retries.setter
    def max_retries(self, retries: Retry) -> None:
        if type(retries) is Retry:
            retries = copy.copy(retries)
            retries.__class__ = _CooperativeRetry
        self._max_retries = retries

    def init_poolmanager(
        self, connections: int, maxsize: int, block: bool = DEFAULT_POOLBLOCK, **pool_kwargs: Any
    ) -> None:
        """Make the pools, of streams."""
        super().init_poolmanager(connections, maxsize, block, **pool_kwargs)
        classes = {
            "http": functools.partial(_StreamPool, opener=self._open),
            "https": functools.partial(_TLSPool, opener=self._open),
        }
        # Typed as classes, and only ever called.
        self.poolmanager.pool_classes_by_scheme = cast(Any, classes)

    def _open(self) -> Stream:
        session = self._source if isinstance(self._source, Session) else self._source()
        return session.open()

    def build_connection_pool_key_attributes(
        self, request: PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Say which pool a request belongs to."""
        host, settings = super().build_connection_pool_key_attributes(request, verify, cert)
        host["scheme"] = _scheme_inside(urlsplit(request.url or ""))
        return host, settings

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> Response:
        """Send a request, as requests does; `proxies` are not used, as a stream leads to the peer and nowhere else."""
        _let_urls_be_relative(urlsplit(request.url or "").scheme)
        return super().send(request, stream, timeout, verify, cert)

    def close(self) -> None:
        """Close the idle streams now, and those in use when their answers have been read."""
        pools = self.poolmanager.pools
        for key in pools.keys():  # noqa: SIM118  # it can't be iterated over
            cast(_StreamPool, pools[key]).let_go()
        super().close()

    def build_response(self, req: PreparedRequest, resp: Any) -> Response:
        """As requests does. A server that names itself in ``Location`` knows no scheme but http and https."""
        response = super().build_response(req, resp)
        location = response.headers.get("location")
        if location is not None:
            response.headers["location"] = _as_seen_from(req.url or "", location)
        return response


# --- below requests: what urllib3 makes connections with


class _Connection(HTTPConnection):
    """A connection that is a stream."""

    def __init__(self, *args: Any, opener: Callable[[], Stream], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opener = opener
        #: What `sock` is, or what is below its TLS.
        self._stream: Stream | None = None

    def _new_conn(self) -> Any:
        limit = gevent.Timeout.start_new(self.timeout)
        try:
            stream = self._opener()
        except gevent.Timeout as error:
            if error is not limit:
                raise
            raise ConnectTimeoutError(self, f"no stream to {self.host} within {self.timeout} seconds") from None
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"no stream to {self.host} in time: {error}") from error
        except OSError as error:
            raise NewConnectionError(self, f"no stream to {self.host}: {error}") from error
        finally:
            limit.close()
        stream.settimeout(self.timeout)
        self._stream = stream
        return stream

    @property
    def is_connected(self) -> bool:
        """Fit for another request: nothing has come since the last one, no end and no error either.

        Nor after the peer has gone away: it would serve on as long as one of its streams is used.
        """
        # urllib3 asks this with poll, for which there is no descriptor.
        stream = self._stream
        return self.sock is not None and stream is not None and not (stream.ready() or stream.session.peer_went_away)


class _TLSConnection(_Connection, HTTPSConnection):
    """TLS inside a stream. What is verified, and how, is left to urllib3."""

    def connect(self) -> None:
        """Open a stream and do the handshake in it."""
        # Not a public name of urllib3: nothing public verifies as much and can do without a descriptor.
        from urllib3.connection import _ssl_wrap_socket_and_match_hostname as wrap

        # At once, so that close() finds it if the handshake fails.
        self.sock = self._new_conn()
        wrapped = wrap(
            self.sock,
            cert_reqs=self.cert_reqs,
            ssl_version=self.ssl_version,
            ssl_minimum_version=self.ssl_minimum_version,
            ssl_maximum_version=self.ssl_maximum_version,
            ca_certs=self.ca_certs,
            ca_cert_dir=self.ca_cert_dir,
            ca_cert_data=self.ca_cert_data,
            cert_file=self.cert_file,
            key_file=self.key_file,
            key_password=self.key_password,
            server_hostname=(self.server_hostname or self.host).rstrip("."),
            ssl_context=self.ssl_context,
            # The handshake goes through buffers in memory, as for TLS inside the TLS of a proxy.
            tls_in_tls=True,
            assert_hostname=self.assert_hostname,
            assert_fingerprint=self.assert_fingerprint,
        )
        self.sock = cast(Any, wrapped.socket)
        self.is_verified = wrapped.is_verified


class _Idle(LifoQueue):  # type: ignore[type-arg]  # at run time, older versions of gevent take none
    """The idle streams of a pool. urllib3's own queue would block the hub when a greenlet waits for one."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize or None)


class _StreamPool(HTTPConnectionPool):
    """A pool that can be let go of. urllib3 closes what is idle when the last answer from a pool is forgotten."""

    QueueCls = cast(Any, _Idle)
    ConnectionCls: Any = _Connection
    _is_let_go = False

    def let_go(self) -> None:
        """Close what is idle, and what comes back later. Greenlets that wait for a stream still get one."""
        self._is_let_go = True
        # They stay in the queue: a greenlet that waits there for one gets it, and it opens another stream.
        for connection in list(cast(_Idle, self.pool).queue):
            if connection is not None:
                connection.close()

    def _put_conn(self, conn: Any) -> None:
        if self._is_let_go and conn is not None:
            conn.close()
        super()._put_conn(conn)


class _TLSPool(_StreamPool, HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _CooperativeRetry(Retry):
    """urllib3's, but other greenlets run while it sleeps."""

    def sleep_for_retry(self, response: Any) -> bool:
        """Sleep as long as the server asks for."""
        seconds = self.get_retry_after(response)
        if seconds:
            gevent.sleep(seconds)
        return bool(seconds)

    def sleep(self, response: Any = None) -> None:
        """Sleep before the next try."""
        if not (self.respect_retry_after_header and response and self.sleep_for_retry(response)):
            gevent.sleep(self.get_backoff_time())


# --- URLs


def _scheme_inside(url: SplitResult) -> str:
    """What is spoken in the stream."""
    return "https" if url.scheme.startswith("https") else "http"


def _let_urls_be_relative(scheme: str) -> None:
    """Without this, ``urljoin`` would not follow ``Location: /elsewhere`` in such a URL."""
    for known in (uses_relative, uses_netloc):
        if scheme not in known:
            known.append(scheme)


def _as_seen_from(url: str, location: str) -> str:
    """`location` with the scheme of `url`, if that is the server which says it.

    A server calls itself http, or https where the connection below the session is TLS.
    """
    ours = urlsplit(url)
    if ours.scheme in _DEFAULT_PORTS:
        return location
    try:
        theirs = urlsplit(location)
        default = _DEFAULT_PORTS.get(theirs.scheme)
        is_same = default and (theirs.hostname, theirs.port or default) == (ours.hostname, ours.port or default)
    except ValueError:  # no URL at all: requests says so
        return location
    return ours.scheme + location[len(theirs.scheme) :] if is_same else location

"""A program whose standard library is patched before anything else is imported: requests over streams, many at once."""

from gevent import monkey

monkey.patch_all()

import ssl  # noqa: E402

import gevent  # noqa: E402
import gevent.ssl  # noqa: E402
import requests  # noqa: E402
from urllib3.util.retry import Retry  # noqa: E402

from geyamux.requests import YamuxAdapter  # noqa: E402
from webclients.backend import serving  # noqa: E402


def main() -> None:
    assert ssl.SSLContext is gevent.ssl.SSLContext
    with serving("tcp") as backend, requests.Session() as http:
        backend.expected = 20
        backend.spoils = 2
        adapter = YamuxAdapter(backend.session, pool_maxsize=20, pool_block=True, max_retries=Retry(3))
        http.mount("http://backend/", adapter)
        http.mount("http://other/", YamuxAdapter(backend.session))
        print(http.get("http://backend/reset").text, backend.requests.count("GET /reset"))
        waiting = [gevent.spawn(http.get, "http://backend/together") for _ in range(40)]
        answers = [greenlet.get() for greenlet in waiting]
        print({response.text for response in answers}, backend.most_at_once, backend.session.num_streams)
        print(len(http.get("http://backend/big?64").content))
        try:
            http.get("http://other/never", timeout=0.05)
        except requests.ReadTimeout:
            print("too late")


if __name__ == "__main__":
    main()

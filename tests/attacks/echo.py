"""A plain echo over TCP, one connection: what a round trip costs on this machine where nothing is under attack."""

from __future__ import annotations

import json
import socket


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps(listener.getsockname()[1]), flush=True)
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(4096):
            connection.sendall(data)


if __name__ == "__main__":
    main()

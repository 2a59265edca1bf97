"""smtplib and imaplib as they are, over streams: what a test plays here it judges there.

Each has one method that makes its socket; a subclass opens a stream there.
"""

from __future__ import annotations

import hashlib
import imaplib
import smtplib
from email.message import EmailMessage
from typing import Any

import gevent

from consumers import real_scene
from consumers.real_scene import Facts, error_of

PICTURE = bytes(range(256)) * 8000


class StreamSMTP(smtplib.SMTP):
    """smtplib over a stream of a session."""

    def __init__(self, session: Any, **kwargs: Any) -> None:
        self._session = session
        super().__init__("mail.example", local_hostname="client.example", **kwargs)

    def _get_socket(self, host: str, port: int, timeout: float) -> Any:
        stream = self._session.open()
        stream.settimeout(timeout)
        return stream


class StreamIMAP(imaplib.IMAP4):
    """imaplib over a stream of a session."""

    def __init__(self, session: Any) -> None:
        self._session = session
        super().__init__()

    def _create_socket(self, timeout: float | None) -> Any:
        stream = self._session.open()
        stream.settimeout(timeout)
        return stream


def mail(number: int, picture: bytes = b"") -> EmailMessage:
    """A mail, with a picture where there is one."""
    message = EmailMessage()
    message["From"] = "sender@example.org"
    message["To"] = "reader@example.org"
    message["Subject"] = f"number {number}"
    message.set_content("A line.\n.A line with a dot in front.\nGrüße.\n")
    if picture:
        message.add_attachment(picture, maintype="image", subtype="png", filename="picture.png")
    return message


# --- scenes ---


def smtp(session: Any, options: dict[str, Any]) -> Facts:
    """Several mails over one stream, a large one, a refusal in between, and many senders at a time."""
    with StreamSMTP(session, timeout=10) as sender:
        for number in range(5):
            sender.send_message(mail(number))
        sender.send_message(mail(5, PICTURE))
        refused = sender.docmd("NONSENSE")[0]
        alive = sender.noop()[0]

    def send(number: int) -> None:
        with StreamSMTP(session, timeout=10) as sender:
            sender.send_message(mail(number))

    gevent.joinall([gevent.spawn(send, number) for number in range(6, 26)], raise_error=True)
    return {"refused": refused, "alive": alive, "picture": hashlib.sha256(PICTURE).hexdigest()}


def smtp_silence(session: Any, options: dict[str, Any]) -> Facts:
    """Wait for a greeting that does not come."""
    return {"error": error_of(StreamSMTP, session, timeout=0.2)}


def imap(session: Any, options: dict[str, Any]) -> Facts:
    """Mails in, found, read, thrown away; the large one is a literal of many windows."""
    mails = [mail(1).as_bytes(), mail(2, PICTURE).as_bytes(), mail(3).as_bytes()]
    box: Any  # its answers are of as many types as there are commands
    with StreamIMAP(session) as box:
        state = box.state
        for message in mails:
            box.append("INBOX", None, None, message)
        selected = box.select("INBOX")
        found = box.search(None, "SUBJECT", '"number 2"')
        _, [(_, body), *_] = box.fetch("2", "(RFC822)")
        box.store("1", "+FLAGS", r"(\Deleted)")
        box.expunge()
        left = box.select("INBOX")
    return {
        "state": state,
        "selected": selected[1][0].decode(),
        "found": found[1][0].decode(),
        "same": body.splitlines() == mails[1].splitlines(),
        "left": left[1][0].decode(),
    }


if __name__ == "__main__":
    real_scene.main(globals())

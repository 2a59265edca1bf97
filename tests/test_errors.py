"""The exceptions: what each is, the errno it bears, and how a reason is told again."""

from __future__ import annotations

import errno

import pytest

from geyamux import errors

BASES = {
    "YamuxError": (Exception,),
    "ConfigError": (errors.YamuxError, ValueError),
    "SessionError": (errors.YamuxError, ConnectionError),
    "SessionClosed": (errors.SessionError,),
    "ProtocolError": (errors.SessionError,),
    "RemoteError": (errors.SessionError,),
    "KeepaliveTimeout": (errors.SessionError,),
    "WriteTimeout": (errors.SessionError,),
    "TransportError": (errors.SessionError,),
    "RemoteGoAway": (errors.YamuxError, ConnectionRefusedError),
    "StreamsExhausted": (errors.YamuxError, OSError),
    "StreamError": (errors.YamuxError, ConnectionError),
    "StreamReset": (errors.StreamError, ConnectionResetError),
    "StreamClosed": (errors.StreamError, BrokenPipeError),
}

PLAIN_SESSION_ERRORS = [
    errors.SessionError,
    errors.SessionClosed,
    errors.ProtocolError,
    errors.KeepaliveTimeout,
    errors.WriteTimeout,
    errors.TransportError,
]


def test_the_tree_is_the_promised_one():
    assert {name: getattr(errors, name).__bases__ for name in errors.__all__} == BASES


def test_the_tree_in_the_docstring_names_every_class():
    assert errors.__doc__ is not None
    assert [name for name in errors.__all__ if name not in errors.__doc__] == []


@pytest.mark.parametrize("kind", PLAIN_SESSION_ERRORS)
def test_a_session_error_bears_econnreset_first(kind):
    error = kind("it ended")
    assert error.args == (errno.ECONNRESET, "it ended")
    assert error.errno == errno.ECONNRESET
    assert error.message == "it ended"
    assert str(error) == f"[Errno {errno.ECONNRESET}] it ended"


def test_a_remote_error_bears_the_code_of_the_go_away():
    error = errors.RemoteError("told to go", 2)
    assert (error.errno, error.message, error.code) == (errno.ECONNRESET, "told to go", 2)


def test_a_refused_open_bears_econnrefused():
    assert errors.RemoteGoAway().args == (errno.ECONNREFUSED, "the peer takes no new streams")
    assert errors.RemoteGoAway("not now").strerror == "not now"


def test_exhausted_streams_bear_eaddrnotavail():
    assert errors.StreamsExhausted().args == (errno.EADDRNOTAVAIL, "no stream id is left on this session")


@pytest.mark.parametrize("remote", [True, False])
def test_a_stream_reset_tells_code_and_side(remote):
    error = errors.StreamReset("given up", 7, remote=remote)
    assert (error.errno, error.strerror, error.code, error.remote) == (errno.ECONNRESET, "given up", 7, remote)
    assert errors.StreamReset("given up", remote=remote).code == 0


def test_a_closed_stream_bears_ebadf_and_one_shut_down_epipe():
    assert errors.StreamClosed("used after close").args == (errno.EBADF, "used after close")
    assert errors.StreamClosed("written after shutdown", errno.EPIPE).args == (errno.EPIPE, "written after shutdown")


@pytest.mark.parametrize("kind", PLAIN_SESSION_ERRORS)
def test_a_reason_told_again_is_a_fresh_error_chained_to_it(kind):
    reason = kind("it ended")
    again = reason.again()
    assert type(again) is kind
    assert again is not reason
    assert again.args == reason.args
    assert again.__cause__ is reason


@pytest.mark.parametrize("kind", PLAIN_SESSION_ERRORS)
def test_a_reason_with_a_cause_told_again_is_chained_to_the_root(kind):
    root = OSError(errno.ENETDOWN, "no network")
    reason = kind("it broke")
    reason.__cause__ = root
    assert reason.again().__cause__ is root
    assert reason.again().again().__cause__ is root


def test_a_remote_error_told_again_keeps_its_code():
    reason = errors.RemoteError("told to go", 41)
    again = reason.again()
    assert type(again) is errors.RemoteError
    assert again is not reason
    assert (again.code, again.message, again.__cause__) == (41, "told to go", reason)


def test_raising_a_reason_again_and_again_does_not_collect_tracebacks():
    reason = errors.SessionClosed("it ended")
    for _ in range(3):
        with pytest.raises(errors.SessionClosed):
            raise reason.again()
    assert reason.__traceback__ is None

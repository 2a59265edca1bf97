"""The settings: the defaults that are promised, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geyamux.config import UNSET, Config
from geyamux.errors import ConfigError

DEFAULTS = {
    "accept_backlog": 256,
    "max_incoming_streams": 4096,
    "max_outgoing_streams": None,
    "accept_timeout": 60.0,
    "keepalive_interval": 30.0,
    "keepalive_timeout": 10.0,
    "connection_write_timeout": 10.0,
    "stream_open_timeout": None,
    "stream_close_timeout": 300.0,
    "close_timeout": 5.0,
    "max_stream_window": 262144,
    "window_auto_tune": False,
    "receive_budget": 67108864,
    "max_frame_size": None,
    "outbox_limit": 262144,
    "stream_timeout": UNSET,
}

# name: lowest, highest, whether None is a value
COUNTS = {
    "accept_backlog": (1, 1 << 20, False),
    "max_incoming_streams": (0, 1 << 31, True),
    "max_outgoing_streams": (1, 1 << 31, True),
    "max_stream_window": (262144, (1 << 31) - 1, False),
    "window_auto_tune": (262144, (1 << 31) - 1, False),
    "receive_budget": (262144, 1 << 62, False),
    "max_frame_size": (1024, 1048576, True),
    "outbox_limit": (4096, 1 << 40, False),
}

TIMES = [
    "accept_timeout",
    "keepalive_interval",
    "keepalive_timeout",
    "connection_write_timeout",
    "stream_open_timeout",
    "stream_close_timeout",
    "close_timeout",
    "stream_timeout",
]
MAY_BE_ZERO = {"close_timeout", "stream_timeout"}
NEVER_NONE = {"keepalive_timeout"}


def make(**settings) -> Config:
    """A config where nothing but the setting itself can be wrong."""
    if "max_stream_window" in settings:
        settings.setdefault("receive_budget", 1 << 62)
    return Config(**settings)


def test_the_defaults_are_the_promised_ones():
    assert {field.name: getattr(Config(), field.name) for field in dataclasses.fields(Config)} == DEFAULTS


def test_every_setting_is_tested_here_as_a_count_or_a_time():
    assert {field.name for field in dataclasses.fields(Config)} == set(COUNTS) | set(TIMES)


def test_a_config_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().accept_backlog = 1  # type: ignore[misc]


def test_settings_are_given_by_name():
    with pytest.raises(TypeError):
        Config(256)  # type: ignore[misc]


def test_equal_settings_make_equal_configs_that_can_be_keys():
    assert Config(accept_backlog=3) == Config(accept_backlog=3) != Config()
    assert len({Config(accept_backlog=3), Config(accept_backlog=3), Config()}) == 2


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_takes_its_lowest_and_highest_value(name):
    low, high, _ = COUNTS[name]
    assert getattr(make(**{name: low}), name) == low
    assert getattr(make(**{name: high}), name) == high


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_outside_its_range_is_refused_by_name(name):
    low, high, _ = COUNTS[name]
    for value in (low - 1, high + 1, -1):
        with pytest.raises(ConfigError, match=rf"^{name}={value} is outside {low} \.\. {high}$"):
            make(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [262144.0, "262144", b"x", (), math.inf])
def test_a_count_that_is_no_int_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be an int"):
        make(**{name: value})


@pytest.mark.parametrize("name", sorted(set(COUNTS) - {"window_auto_tune"}))
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_no_count(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be an int"):
        make(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_none_is_a_count_only_where_there_may_be_no_limit(name):
    if COUNTS[name][2]:
        assert getattr(Config(**{name: None}), name) is None
    else:
        with pytest.raises(ConfigError, match=rf"^{name} must be an int, not None$"):
            Config(**{name: None})


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [0.001, 1, 1e9])
def test_a_time_is_any_positive_number_of_seconds(name, value):
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize("name", TIMES)
def test_no_time_is_negative(name):
    with pytest.raises(ConfigError, match=rf"^{name}=-1 must be more than 0 seconds$"):
        Config(**{name: -1})


@pytest.mark.parametrize("name", TIMES)
def test_a_time_of_zero_is_refused_where_it_would_mean_at_once_for_ever(name):
    if name in MAY_BE_ZERO:
        assert getattr(Config(**{name: 0}), name) == 0
    else:
        with pytest.raises(ConfigError, match=rf"^{name}=0 must be more than 0 seconds$"):
            Config(**{name: 0})


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "5", True, False, ()])
def test_a_time_that_is_no_finite_number_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be a number of seconds"):
        Config(**{name: value})


@pytest.mark.parametrize("name", TIMES)
def test_none_as_a_time_means_for_ever_where_that_makes_sense(name):
    if name in NEVER_NONE:
        with pytest.raises(ConfigError, match=rf"^{name} must be a number of seconds, not None$"):
            Config(**{name: None})
    else:
        assert getattr(Config(**{name: None}), name) is None


def test_an_error_is_a_value_error_too():
    with pytest.raises(ValueError):
        Config(accept_backlog=0)


def test_a_receive_budget_below_one_window_is_refused():
    with pytest.raises(ConfigError, match=r"^receive_budget=524288 is below max_stream_window=1048576"):
        Config(max_stream_window=1 << 20, receive_budget=1 << 19)
    assert Config(max_stream_window=1 << 20, receive_budget=1 << 20).receive_budget == 1 << 20


def test_a_limit_of_growth_below_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"^window_auto_tune=262144 is below max_stream_window=1048576$"):
        Config(max_stream_window=1 << 20, window_auto_tune=262144)


@pytest.mark.parametrize(
    ("window", "auto_tune", "limit"),
    [
        (262144, False, 262144),
        (1 << 20, False, 1 << 20),
        (262144, True, 16777216),
        (1 << 25, True, 1 << 25),
        (262144, 1 << 22, 1 << 22),
        (1 << 22, 1 << 22, 1 << 22),
    ],
)
def test_the_limit_of_a_window_follows_from_both_settings(window, auto_tune, limit):
    assert Config(max_stream_window=window, window_auto_tune=auto_tune).window_limit == limit


def test_unset_says_so_when_printed():
    assert repr(UNSET) == "<unset>"
    assert "stream_timeout=<unset>" in repr(Config())


@given(st.integers(262144, (1 << 31) - 1), st.one_of(st.booleans(), st.integers(262144, (1 << 31) - 1)))
def test_the_limit_of_a_window_is_never_below_it(window, auto_tune):
    try:
        config = Config(max_stream_window=window, window_auto_tune=auto_tune, receive_budget=1 << 62)
    except ConfigError:
        assert not isinstance(auto_tune, bool)
        assert auto_tune < window
    else:
        assert config.window_limit >= window

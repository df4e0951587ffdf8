"""Channels with the settings that all clients share."""

from __future__ import annotations

import grpc

from services.rpc.tls import channel_credentials, server_name_options, split_address
from services.wire.protocol import MAX_MESSAGE_BYTES

SERVER_MIN_PING_MS = 300_000
"""Least time between pings without data at which a server with gRPC's defaults keeps the connection open."""
KEEPALIVE_MS = SERVER_MIN_PING_MS + 30_000

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # One connection for each channel: streams to one address share no flow-control window.
    ("grpc.use_local_subchannel_pool", 1),
    # Where a name stands for several pods, such as that of a headless Service, calls go to each in turn.
    ("grpc.lb_policy_name", "round_robin"),
    # A server answers pings that come faster than it allows (gRPC's default, that of Serve's proxy: one in 5 minutes)
    # with GOAWAY, which ends calls that are merely quiet. Keepalive is for connections without a stream (heartbeats) or
    # a call (deadline).
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Attempts to reconnect stay frequent, however long the server was away.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # longest time of one attempt
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def open_channel(address: str) -> grpc.Channel:
    """Return a channel for blocking calls: plain to host:port, with TLS to grpcs://host:port (see services/rpc/tls.py).

    Raises ValueError naming the variable of the environment that is wrong.
    """
    target, secure = split_address(address)
    if not secure:
        return grpc.insecure_channel(target, options=_OPTIONS)
    return grpc.secure_channel(target, channel_credentials(), options=[*_OPTIONS, *server_name_options()])


def open_aio_channel(address: str) -> grpc.aio.Channel:
    """Return a channel as `open_channel` does, for calls on the running event loop."""
    target, secure = split_address(address)
    if not secure:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    return grpc.aio.secure_channel(target, channel_credentials(), options=[*_OPTIONS, *server_name_options()])

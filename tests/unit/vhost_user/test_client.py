"""The dialogue by itself: what happens to descriptors in replies, and to refusals."""

from __future__ import annotations

import os
from time import monotonic

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, no_new_fds

from pyvmm.errors import LocalProtocolError, RemoteProtocolError
from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.client import Client, Refusal
from pyvmm.vhost_user.codec import Message
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, Config, Inflight


def inflight(backend: FakeBackend, message: Message) -> bytes:
    """A reply with the one descriptor that belongs to it."""
    backend.fds.append(os.memfd_create("inflight"))
    data = backend.responder.reply(Inflight(4096, 0, 1, 64), 1)
    backend.channel.send(data, backend.fds[-1:], monotonic() + 5)
    return b""


def connected(script: fake.Script | None = None) -> tuple[FakeBackend, Client]:
    backend = FakeBackend(script=script)
    client = Client(Channel(backend.connect(1)), 5.0)
    client.open(lambda offered: offered & (P.INFLIGHT_SHMFD | P.REPLY_ACK | P.CONFIG))
    return backend, client


def test_descriptors_in_a_reply_are_closed_when_nobody_takes_them() -> None:
    with no_new_fds():
        backend, client = connected({"GET_INFLIGHT_FD": inflight})
        assert client.call("GET_INFLIGHT_FD", Inflight(0, 0, 1, 64)) == Inflight(4096, 0, 1, 64)
        client.close()
        backend.close()


def test_refusal_names_the_request_and_the_dialogue_goes_on() -> None:
    with no_new_fds():
        backend, client = connected({"SET_CONFIG": fake.status(22)})
        with pytest.raises(Refusal, match=r"refused SET_CONFIG \(status 22\)"):
            client.call("SET_CONFIG", Config(0, 0, b"x"))
        assert client.call("GET_FEATURES") == U64(fake.VIRTIO)
        client.close()
        backend.close()


def test_the_error_names_the_request() -> None:
    with no_new_fds():
        backend, client = connected({"SET_FEATURES": fake.hang_up})
        with pytest.raises(RemoteProtocolError, match=r"^SET_FEATURES: the connection was closed$"):
            client.call("SET_FEATURES", U64(0))
        client.close()
        backend.close()


def test_an_ungated_request_is_not_sent() -> None:
    with no_new_fds():
        backend, client = connected()
        with pytest.raises(LocalProtocolError, match="GET_QUEUE_NUM without MQ"):
            client.call("GET_QUEUE_NUM")
        assert "GET_QUEUE_NUM" not in backend.names
        client.close()
        backend.close()

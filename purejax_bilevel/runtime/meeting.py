"""How several processes meet before jax.distributed takes over, which ends with a stack trace when one is missing.

Process 0 listens at the coordinator's address only, where that is its own. With PUREJAX_BILEVEL_JOIN_TOKEN set, the
same for all, nobody else can take a process's place.
"""

import contextlib
import dataclasses
import hmac
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime.schedulers import ProcessPlace

JOIN_SECONDS = 300  # until all processes must have come
TOKEN = "PUREJAX_BILEVEL_JOIN_TOKEN"  # who does not know it cannot join; jax.distributed itself asks for none
LONGEST_LINE = 10_000


def meet(place: ProcessPlace) -> None:
    """Waits until all processes are here. jax.distributed itself aborts with a stack trace when one is missing."""
    if place.process_id == 0:
        _await_others(place)
    else:
        _go_to_first(place)


def _await_others(place: ProcessPlace) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(place))
        arrived: dict[int, socket.socket] = {}
        problem = ""
        while not problem and len(arrived) < place.num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.num_processes) if i not in arrived]
                problem = (
                    f"of {place.num_processes} processes {len(arrived) + 1} came to {place.coordinator} within "
                    f"{JOIN_SECONDS} s; process {', '.join(missing)} did not."
                )
                break
            stack.enter_context(connection)
            connection.settimeout(10)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a stranger at the port: none of us
                other = _welcome(connection)
                if other is None:
                    continue
                problem = _mismatch(place, other, arrived)
                arrived.setdefault(other.process_id, connection)
        for connection in arrived.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
    if problem:
        raise UserError(problem)


def _welcome(connection: socket.socket) -> ProcessPlace | None:
    """Who came; None for one that does not know the token, which is told so and never sent over the network."""
    nonce = secrets.token_hex(16)
    connection.sendall(f"{nonce}\n".encode())
    told = json.loads(connection.makefile().readline(LONGEST_LINE))
    if hmac.compare_digest(_proof(nonce, told["place"]), str(told["proof"])):
        return ProcessPlace(**told["place"])
    connection.sendall(f"process 0 does not know this process: {TOKEN} must be the same for all.\n".encode())
    return None


def _proof(nonce: str, place: Mapping[str, Any]) -> str:
    """Of knowing the token; without one, of coming from the same program."""
    message = json.dumps([nonce, place], sort_keys=True).encode()
    return hmac.new(os.environ.get(TOKEN, "").encode(), message, "sha256").hexdigest()


def _mismatch(place: ProcessPlace, other: ProcessPlace, arrived: Mapping[int, Any]) -> str:
    if other.num_processes != place.num_processes:
        return (
            f"process {other.process_id} was told --num_processes {other.num_processes}, process 0 "
            f"{place.num_processes}; it must be the same."
        )
    if other.process_id in arrived:
        return f"two processes were told --process_id {other.process_id}; each needs its own."
    return ""


def _listen(place: ProcessPlace) -> socket.socket:
    host, _, port = bind_address(place).rpartition(":")
    try:
        if host == "[::]" and not socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)))
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        return socket.create_server((host.strip("[]"), int(port)), family=family, dualstack_ipv6=host == "[::]")
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {place.coordinator} ({error.strerror}); take a free port."
        ) from error


def bind_address(place: ProcessPlace) -> str:
    """Where process 0 listens: the coordinator's address alone, if it is one of this host.

    A host's own name may mean its loopback address on the host itself; others could not come there. Then, and where
    the address belongs to something in front of this host, it listens at all addresses.
    """
    name, _, port = place.coordinator.rpartition(":")
    name = name.strip("[]")
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, _, _, _, address in found:
        host = str(address[0])
        if (_means_loopback(name) or not _means_loopback(host)) and _is_own(family, host):
            return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
    return f"[::]:{port}"


def _is_own(family: int, host: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _means_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def _go_to_first(place: ProcessPlace) -> None:
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + JOIN_SECONDS
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                connection.settimeout(left + 5)  # process 0 says who is missing
                lines, told = connection.makefile(), dataclasses.asdict(place)
                proof = _proof(lines.readline().strip(), told)
                connection.sendall(json.dumps({"place": told, "proof": proof}).encode() + b"\n")
                answer = lines.readline()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            answer = ""
        if answer == "\n":
            return
        if answer:
            raise UserError(answer.strip())
        time.sleep(min(0.2, left))  # not there yet, or a connection that ended
    raise UserError(
        f"process {place.process_id} cannot reach process 0 at {place.coordinator} within {JOIN_SECONDS} s ({reason})."
    )

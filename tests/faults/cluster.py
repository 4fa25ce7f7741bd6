"""A running Ray cluster of one node that commands join, as they do in a Ray job; and somebody else who holds a part of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.job import processes_of, wait

HOLDER = """
import sys, time, ray

class Holder:
    def there(self):
        return True

ray.init()
holder = ray.remote(num_cpus=float(sys.argv[1]))(Holder).remote()
assert ray.get(holder.there.remote())
print("held", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Cluster:
    """Where it answers.

    Attributes:
        address: for drivers, as RAY_ADDRESS.
        server: URL of its job server.
    """

    address: str
    server: str


@contextmanager
def started(cpus: int) -> Iterator[Cluster]:
    """Run a cluster with so many CPUs and a job server while the block runs."""
    import ray

    folder = tempfile.mkdtemp(prefix="rf-")
    port, server = _free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}"),
        *(f"--temp-dir={folder}", "--include-dashboard=true"),
        *(f"--dashboard-port={server}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"),
    ]
    with Path(folder, "head.log").open("wb") as log:
        environment = {**os.environ, "RAY_JOB_STOP_WAIT_TIME_S": "60"}  # as cluster/kuberay sets it
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait(lambda: _answers(server) or head.poll() is not None, 90, "the job server")
        assert head.poll() is None, Path(folder, "head.log").read_text()
        yield Cluster(f"{ray.util.get_node_ip_address()}:{port}", f"http://127.0.0.1:{server}")
    finally:
        while left := processes_of(head.pid):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            head.poll()
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Let commands of this process join the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield


@contextmanager
def held(cluster: Cluster, cpus: float) -> Iterator[subprocess.Popen[bytes]]:
    """Another driver's actor holds so many CPUs until the driver is killed, or until the end of the block."""
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen([sys.executable, "-c", HOLDER, str(cpus)], env=environment, stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None and b"held\n" in iter(driver.stdout.readline, b"")
        yield driver
    finally:
        driver.kill()
        driver.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _answers(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/api/jobs/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

"""A cluster of two nodes, of which one does not see the run's directory: refused before anything is built, and the node is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.actors.shared import check_shared
from rayft.errors import ResourceError

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

HIDING = 'mount -t tmpfs none "$1" && exec "$2" -m ray.scripts.scripts start --address "$3" --num-cpus 1 --block'
"""Starts a node in whose view the folder is another one."""


@pytest.fixture
def blind_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that the second node of a running cluster does not see."""
    import ray

    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this kernel gives no mount namespaces to this user")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    # `ray start` notes the cluster in its folder, and in the usual one every later ray.init() of this machine would join it.
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.shutdown()
    context = ray.init(num_cpus=1, include_dashboard=False, _temp_dir=folder)
    address = context.address_info["gcs_address"]
    command = ["unshare", "-m", "sh", "-c", HIDING, "sh", str(hidden), sys.executable, address]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert time.monotonic() < end, "the second node did not come"
            time.sleep(0.2)
        yield hidden
    finally:
        os.killpg(node.pid, 15)
        node.wait(30)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_does_not_see_the_run_is_named(blind_folder: Path, tmp_path: Path) -> None:
    check_shared(tmp_path, "cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["hidden"], "the token is gone"
    with pytest.raises(ResourceError, match=rf"run directory = '{blind_folder}': is not there on .* \(.*\)\. Use a folder on storage"):
        check_shared(blind_folder, "cpu")
    assert list(blind_folder.iterdir()) == []

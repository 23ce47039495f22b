"""The files of launch/ without their schedulers: Kubernetes' kinds against strict schemas, what torchrun.sh refuses and finds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.needed import lack

LAUNCH = ROOT / "launch"
TOOLS = ROOT / ".venv-launch" / "bin" / "python"


def check(*files: Path) -> list[list[str]]:
    """Return the problems of each file."""
    if not TOOLS.exists():
        lack(f"no {TOOLS}; scripts/install_tools.sh makes it")
    done = subprocess.run(
        [str(TOOLS), str(ROOT / "tests" / "support" / "kubernetes_check.py"), *map(str, files)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


MUTATIONS = {
    "kubernetes.yaml": [
        ("numNodes: 2", "numNodes: -3", "numNodes"),
        ("numNodes: 2", "numNode: 2", "'numNode' was unexpected"),
        ("numProcPerNode: 4", "numProcPerNode: auto", "numProcPerNode"),
        ("volumeMounts:", "volumeMount:", "'volumeMount' was unexpected"),
        ("memory: 12Gi}\n", "memory: 12 Gi}\n", "12 Gi"),
        ("kind: ClusterTrainingRuntime", "kind: Runtime", "Runtime"),
        ("trainer.kubeflow.org/v1alpha1", "kubeflow.org/v1", "apiVersion"),
        ("  runtimeRef:\n", "  runtimeReference:\n", "'runtimeRef' is a required property"),
        ("terminationGracePeriodSeconds: 45", "terminationGracePeriodSeconds: -1", "terminationGracePeriodSeconds"),
        ("  export.yaml: |", "  export.yaml: [1]\n  other: |", "ConfigMap"),
        ("  name: dist-export\nspec", "  name: Dist_Export\nspec", "Dist_Export"),
    ],
    "pytorchjob.yaml": [
        ("      replicas: 1", "      replicas: -3", "replicas"),
        ("    Worker:", "    Workers:", "Workers"),
        ('nprocPerNode: "4"', "nprocPerNode: 4", "nprocPerNode"),
        ("restartPolicy: OnFailure", "restartPolicy: Sometimes", "Sometimes"),
        ("cleanPodPolicy: None", "cleanPodPolicies: None", "'cleanPodPolicies' was unexpected"),
        ("name: pytorch #", "name: export #", "pytorch"),
        ("backoffLimit: 3", "backoffLimit: -1", "backoffLimit"),
        ("claimName: ckpts", "claim: ckpts", "'claim' was unexpected"),
        ("  runPolicy:\n", "  policy:\n", "'runPolicy' is a required property"),
    ],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_kubernetes_files_keep_to_their_schemas(name: str, tmp_path: Path) -> None:
    """And each mutated one does not, for the reason that it was mutated for."""
    text = (LAUNCH / name).read_text()
    files = [LAUNCH / name]
    for number, (old, new, _) in enumerate(MUTATIONS[name]):
        assert old in text
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(text.replace(old, new, 1))
    problems, *found = check(*files)
    assert problems == []
    for (_, new, expected), told in zip(MUTATIONS[name], found, strict=True):
        assert any(expected in problem for problem in told), f"{new}: {told}"


def torchrun_script(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun.sh with an interpreter that prints what it is called with."""
    return subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "--config", "a b.yaml"],
        env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "two"}, "NNODES is 'two'; a number is needed"),
        ({"NNODES": "0"}, "NNODES is 0; at least one machine is needed"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK is 2, but the machines count from 0 to 1"),
        ({"PET_NNODES": "2"}, "NNODES is 2, so MASTER_ADDR must say where machine 0 is reached"),
        ({"NPROC_PER_NODE": "-3"}, "NPROC_PER_NODE is '-3'; a number is needed"),
        (
            {"NNODES": "2", "MASTER_ADDR": "nowhere.invalid", "PYTHON": sys.executable},
            "no address of this machine towards nowhere.invalid was found",
        ),
    ],
)
def test_torchrun_script_refuses(environment: dict[str, str], message: str) -> None:
    done = torchrun_script(**environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def echo(folder: Path) -> str:
    """Return an interpreter that prints its arguments and the interface, but runs files of launch/ as they are."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/bash\n[[ $1 == *.py ]] && exec {sys.executable} "$@"\nprintf "[%s]" "$@"; echo "{{$GLOO_SOCKET_IFNAME}}"\n'
        'env | grep -E "^(PET_|NNODES|RANK=|WORLD_SIZE)"\nexit 0\n'
    )
    script.chmod(0o755)
    return str(script)


def test_torchrun_script_takes_the_counts_of_kubeflows_operators(tmp_path: Path) -> None:
    done = torchrun_script(
        PYTHON=echo(tmp_path), PET_NNODES="2", PET_NODE_RANK="1", PET_NPROC_PER_NODE="3", PET_MASTER_ADDR="127.0.0.1",
        PET_MASTER_PORT="1234", RANK="1", WORLD_SIZE="2",
    )  # fmt: skip
    assert done.stdout == (
        "[-m][torch.distributed.run][--nproc-per-node][3][--max-restarts][0][--nnodes][2][--rdzv-backend][c10d][--rdzv-id]"
        "[dist_export][--rdzv-endpoint][127.0.0.1:1234][--rdzv-conf][is_host=0][--local-addr][127.0.0.1][-m][dist_export]"
        "[--config][a b.yaml]{lo}\n"
    ), "and none of them is left in the environment, where torchrun would take it for its own"


def test_torchrun_script_on_one_machine(tmp_path: Path) -> None:
    done = torchrun_script(PYTHON=echo(tmp_path), NPROC_PER_NODE="auto", MAX_RESTARTS="2")
    assert "[--nproc-per-node][auto][--max-restarts][2][--standalone][-m][dist_export]" in done.stdout


def test_the_address_that_others_reach() -> None:
    """localhost is good where all are on this machine; of machine 0 others may have to know better."""

    def find(*arguments: str) -> list[str]:
        command = [sys.executable, str(LAUNCH / "find_address.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert find("localhost", "1") == ["127.0.0.1", "lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            expected = "127.0.0.1"
        else:
            expected = probe.getsockname()[0]
    address, interface = find("localhost", "0")
    assert address == expected
    assert interface in os.listdir("/sys/class/net")
    assert find(address, "0") == [address, interface]


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_shell_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)

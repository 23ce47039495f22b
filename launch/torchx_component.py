"""Export by TorchX: torchx run -s SCHEDULER launch/torchx_component.py:export -j 2x4 --config export.yaml.

Further settings of the export come after ``--``: ``... --config export.yaml -- --export_dir /serving/today``. TorchX 0.7.
"""

# TorchX reads the types of the signature as they stand, and knows Optional, List and Dict
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs
from torchx.specs import macros


def export(
    *settings: str,
    config: str,
    j: str = "1x2",
    image: str = "dist_export",
    launcher: str = "launch/torchrun.sh",
    python: str = "python",
    cpu: int = 4,
    memMB: int = 8192,  # noqa: N803 -- TorchX's name
    port: int = 29400,
    max_restarts: int = 0,
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Export a checkpoint with j machines and ranks.

    Args:
        settings: further settings of the export, such as --export_dir DIR
        config: path of export.yaml, as the ranks see it
        j: machines x ranks of each, as in TorchX's own dist.ddp
        image: container image, for schedulers that use one (launch/Dockerfile builds it)
        launcher: path of torchrun.sh, in the image or in the working directory
        python: the interpreter that has dist_export
        cpu: cores of a machine
        memMB: memory of a machine in MB: ranks times (max_memory and 500 MB for the interpreter with torch)
        port: a free port of machine 0
        max_restarts: so often torchrun starts all ranks anew before it gives up
        mounts: volumes as in TorchX's own dist.ddp: type=volume,src=CLAIM,dst=/path[,readonly],type=...
        env: further variables of the ranks, such as AWS_REGION=us-east-1,AWS_PROFILE=serving
    """
    words = j.split("x")
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"-j is {j!r}; give machines and ranks of each, such as 2x4")
    nodes, ranks = map(int, words)
    # the scheduler says by this variable where machine 0 is; on machine 0 itself some leave it out. $$ is TorchX's $
    start = f'MASTER_ADDR="$${{{macros.rank0_env}:-localhost}}" exec bash "$$0" "$$@"'
    return specs.AppDef(
        name="dist-export",
        roles=[
            specs.Role(
                name="export",
                image=image,
                entrypoint="bash",
                args=["-c", start, launcher, "--config", config, *settings],
                num_replicas=nodes,
                env={
                    **(env or {}),
                    "NNODES": str(nodes),
                    "NODE_RANK": macros.replica_id,
                    "NPROC_PER_NODE": str(ranks),
                    "MASTER_PORT": str(port),
                    "JOB_ID": macros.app_id,
                    "MAX_RESTARTS": str(max_restarts),
                    "PYTHON": python,
                },
                resource=specs.Resource(cpu=cpu, gpu=0, memMB=memMB),
                port_map={"c10d": port},
                mounts=specs.parse_mounts(mounts or []),
            )
        ],
    )

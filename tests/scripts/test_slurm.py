"""The SLURM script without a cluster: `srun` and `scontrol` are stubs for two machines, all else is real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123"}
SRUN = """#!/bin/bash
# Runs the command of each task, one after another.
echo "cores of a task: ${SRUN_CPUS_PER_TASK:-as SLURM likes}"
while [[ $1 == --* ]]; do case $1 in *=*) shift;; *) shift 2;; esac; done
for node in 0 1; do
  SLURM_NODEID=$node "$@"
done
"""
ACCELERATE = """#!/bin/bash
echo "launch $*"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder of programs: `scontrol` names the machines, `srun` runs a task for each."""
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, *arguments: str, **job: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *arguments]
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | job
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_machine_launches_with_its_own_number_and_the_address_of_the_first(cluster: Path) -> None:
    (cluster / "accelerate").write_text(ACCELERATE)
    (cluster / "accelerate").chmod(0o755)
    done = submit(cluster, "configs/smoke.yaml", "data.train_files=[a b.txt]", "--dry-run", **JOB)
    common = (
        "launch launch --config_file configs/accelerate/fsdp2-nodes.yaml --num_machines 2 --num_processes 2 "
        "--main_process_ip 127.0.0.1 --main_process_port 20123 --machine_rank {} "
        "train.py configs/smoke.yaml data.train_files=[a b.txt] --dry-run"
    )
    assert done.stdout.splitlines()[1:] == [common.format(0), common.format(1)], done.stderr


def test_each_task_gets_the_cores_that_the_job_asked_for(cluster: Path) -> None:
    (cluster / "accelerate").write_text(ACCELERATE)
    (cluster / "accelerate").chmod(0o755)
    for job, cores in ({"SLURM_CPUS_PER_TASK": "64"}, "64"), ({"SLURM_CPUS_PER_TASK": ""}, "as SLURM likes"):
        done = submit(cluster, "configs/smoke.yaml", **JOB, **job)
        assert done.stdout.splitlines()[0] == f"cores of a task: {cores}", done.stderr


def test_what_a_machine_launches_is_a_real_launch(cluster: Path) -> None:
    one = (cluster / "srun").read_text().replace("for node in 0 1", "for node in 0")
    (cluster / "srun").write_text(one)
    done = submit(cluster, "configs/smoke.yaml", "--dry-run", **JOB | {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan of smoke; nothing was trained") == 1


def test_outside_slurm_and_without_a_config_it_says_how_to_start_it(cluster: Path) -> None:
    outside = {"SLURM_NNODES": "", "SLURM_JOB_ID": ""}
    assert "start me with sbatch, or inside salloc" in submit(cluster, "configs/smoke.yaml", **outside).stderr
    bare = submit(cluster, **JOB)
    assert bare.returncode == 2
    assert "usage: sbatch scripts/slurm/train.sbatch CONFIG.yaml" in bare.stderr

"""The launchers, as real processes: what they print, refuse and start.

gcloud, xpk and Slurm are not at hand; where a launcher reacts to their exit status, small programs
of their names stand in for them.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib

import pytest

from dec_diffusion import options

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
# Each launcher and the least it must be told.
NEEDED = {
    "local.sh": [],
    "slurm.sh": [],
    "tpu_pod.sh": ["--name=pod", "--zone=us-west4-a"],
    "gke_xpk.sh": [
        "--cluster=c", "--zone=us-west4-a", "--type=v5litepod-16", "--name=job", "--image=reg/i:1",
    ],
}  # fmt: skip
NASTY = ["a b", "it's", '"x"', "$HOME", "`id`", "*", "", "a\\b", "é;&|", "-x=(1, 2)"]
PROGRAM = ["python", "-m", "dec_diffusion.main", "--config=configs/clusterddpm.py", *NASTY]


def launch(name, *args, env=None, cwd=None, status=0):
    # What the commands say of XLA_FLAGS depends on those of the shell.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [LAUNCH / name, *args],
        env={**inherited, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return done


def dry_run(name, *args, command=PROGRAM, env=None):
    """The lines that a dry run prints."""
    return launch(name, *NEEDED[name], *args, "--dry-run", "--", *command, env=env).stdout


def words(text):
    return [shlex.split(line) for line in text.splitlines()]


def by_a_shell(line):
    """The words that a shell makes of a line; printed by the shell itself, and nothing is run."""
    script = f"set -- {line}\n" + r"""printf '%s\0' "$@" """
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout.split("\0")[
        :-1
    ]


def stand_in(folder, name, script):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


# -- all --


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}")
    shellcheck = shellcheck or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(LAUNCH.glob("*.sh"))
    assert {f.name for f in files} == {*NEEDED, "command.sh"}
    done = subprocess.run(
        [shellcheck, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", NEEDED)
def test_help_names_every_option_that_is_accepted(name):
    shown = launch(name, "--help").stdout
    accepted = re.search(r'^parse "(.*?)"', (LAUNCH / name).read_text(), re.MULTILINE)
    for option in [*accepted[1].replace("?", "").split(), "dry-run", "help"]:
        assert f"--{option}" in shown
    # The example in it is one that the launcher takes.
    example = shown[shown.index("launch/") :].split("\n\n")[0].replace("\\\n", " ")
    example = shlex.split(example)[1:]
    mark = example.index("--")
    printed = launch(name, *example[:mark], "--dry-run", *example[mark:]).stdout
    assert " -m dec_diffusion.main --config=configs/clusterddpm.py" in printed


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--proceses=2", "--", "x"], "--proceses"),
        (["--name", "--", "x"], "--name"),
        (["--name=", "--", "x"], "--name"),
        (["photos", "--", "x"], "'photos'"),
        ([], "after --"),
        (["--"], "after --"),
    ],
)
def test_bad_arguments_are_named_in_one_line(name, wrong, named):
    if name == "local.sh":
        wrong = [w.replace("--name", "--port") for w in wrong]
        named = named.replace("--name", "--port")
    done = launch(name, *NEEDED[name], *wrong, status=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and named in done.stderr


@pytest.mark.parametrize(
    ("name", "wrong", "remedy"),
    [
        ("local.sh", "--processes=0", "at least 1"),
        ("local.sh", "--devices=two", "whole number"),
        ("local.sh", "--devices=08", "whole number"),
        ("local.sh", "--port=70000", "at most 65535"),
        ("slurm.sh", "--gpus=-1", "at least 1"),
        ("slurm.sh", "--per=host", "gpu or node"),
        ("slurm.sh", "--time=tomorrow", "--time=24:00:00"),
        ("slurm.sh", "--partition=a b", "no spaces"),
        ("slurm.sh", "--warning=70000", "at most 65535"),
        ("tpu_pod.sh", "--restarts=often", "whole number"),
        ("tpu_pod.sh", "--install=dist/other.whl", "pip wheel"),
        ("tpu_pod.sh", "--install=no/dec_diffusion-1.0-py3-none-any.whl", "pip wheel"),
        ("gke_xpk.sh", "--name=My_Job", "small letters"),
        ("gke_xpk.sh", f"--name={'a' * 41}", "at most 40"),
        ("gke_xpk.sh", "--slices=0", "at least 1"),
    ],
)
def test_bad_values_are_refused_with_the_remedy(name, wrong, remedy):
    done = launch(name, *NEEDED[name], wrong, "--", "x", status=2)
    option = wrong.split("=")[0]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {option}=")
    assert remedy in done.stderr


@pytest.mark.parametrize(
    ("name", "left_out"),
    [(name, option) for name, options in NEEDED.items() for option in options],
)
def test_what_is_missing_is_named(name, left_out):
    given = [option for option in NEEDED[name] if option != left_out]
    done = launch(name, *given, "--", "x", status=2)
    assert done.stderr.startswith(f"error: {left_out.split('=')[0]} is missing: give ")


# -- one host --


def test_local_commands(tmp_path):
    printed = dry_run("local.sh", "--processes=3", "--devices", "4", "--port=1234")
    lines = words(printed)
    assert [line[-1] for line in lines] == [f"--process_id={i}" for i in range(3)]
    for line in lines:
        assert line[-4:-1] == [
            "--distributed=on", "--coordinator=127.0.0.1:1234", "--num_processes=3",
        ]  # fmt: skip
        assert line[line.index("python") : -4] == PROGRAM
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=4" in line
        assert "JAX_PLATFORMS=cpu" in line
    assert [by_a_shell(line) for line in printed.splitlines()] == lines
    kept = dry_run("local.sh", "--devices=4", env={"XLA_FLAGS": "--a=1 --b"})
    assert words(kept)[0][4] == "XLA_FLAGS=--a=1 --b --xla_force_host_platform_device_count=4"
    # Without simulated devices the environment is left alone, and a free port is found.
    line = words(dry_run("local.sh"))[1]
    assert line[0] == "python" and 20000 <= int(line[-3].split(":")[1]) < 32000


def test_local_gives_the_options_that_the_program_has():
    command = ["python", "-m", "dec_diffusion.main", "--config=clusterddpm"]
    for line in words(dry_run("local.sh", "--processes=3", command=command)):
        options.parse(["main", *line[3:]])


RECORD = """
import os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
me, mode, folder = flags["process_id"], flags["mode"], flags["folder"]

def preempted(*_):
    open(f"{folder}/saved-{me}", "w").close()
    sys.exit(75)

signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else preempted)
with open(f"{folder}/tmp-{me}", "w") as file:
    print(sys.argv[1:], os.environ.get("XLA_FLAGS"), file=file)
os.rename(f"{folder}/tmp-{me}", f"{folder}/up-{me}")
if mode == "done":
    sys.exit(0)
while len([f for f in os.listdir(folder) if f.startswith("up-")]) < int(flags["num_processes"]):
    time.sleep(0.02)
if mode in ("fail", "deaf") and me == "1":
    sys.exit(7)
time.sleep(50)
"""


def started(folder, mode, *options):
    return subprocess.Popen(
        [LAUNCH / "local.sh", *options, "--", sys.executable, "-c", RECORD, f"--mode={mode}",
         f"--folder={folder}", "--x=a b"],
        stderr=subprocess.PIPE, text=True,
        # As in a terminal: what is started in the background ignores it, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_local_runs_every_process(tmp_path):
    with started(tmp_path, "done", "--processes=3", "--devices=2") as script:
        assert script.wait(60) == 0
    ports = set()
    for i in range(3):
        text = (tmp_path / f"up-{i}").read_text()
        assert "'--x=a b', '--distributed=on', '--coordinator=127.0.0.1:" in text
        assert f"'--num_processes=3', '--process_id={i}'" in text
        assert "device_count=2" in text
        ports.add(re.search(r"127.0.0.1:(\d+)", text)[1])
    assert len(ports) == 1


def test_local_stops_the_others_when_one_fails(tmp_path):
    with started(tmp_path, "fail", "--processes=3") as script:
        assert script.wait(60) == 7
        said = script.stderr.read()
    assert "process 1 ended with status 7; stopping the others" in said
    assert sorted(p.name for p in tmp_path.glob("saved-*")) == ["saved-0", "saved-2"]


def test_local_kills_what_does_not_stop(tmp_path):
    begun = time.monotonic()
    with started(tmp_path, "deaf", "--grace=0") as script:
        assert script.wait(60) == 7
        assert "killing" in script.stderr.read()
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize("given", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_reports_preemption(tmp_path, given):
    with started(tmp_path, "wait") as script:
        limit = time.monotonic() + 60
        while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < limit:
            time.sleep(0.02)
        script.send_signal(given)
        assert script.wait(60) == 75
    assert sorted(p.name for p in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_local_refuses_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = launch("local.sh", f"--port={port}", "--", "true", status=2)
    assert done.stderr.startswith(f"error: --port={port}: is in use")


# -- Slurm --


def job_of(printed):
    first, *job, last = printed.splitlines()
    assert (first, last) == ("sbatch <<'END OF JOB'", "END OF JOB")
    return "\n".join(job) + "\n"


def test_slurm_job():
    job = job_of(
        dry_run(
            "slurm.sh", "--nodes=2", "--gpus=4", "--cpus=6", "--time=1-00:00:00", "--account=me"
        )
    )
    directives = re.findall(r"^#SBATCH --(.*)$", job, re.MULTILINE)
    assert directives == [
        "job-name=dec-diffusion", "output=dec-diffusion-%j.log", "open-mode=append", "requeue",
        "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "time=1-00:00:00",
        "account=me", "signal=TERM@300",
    ]  # fmt: skip
    # Slurm reads no directive after the first command.
    assert job.startswith("#!") and "#SBATCH" not in job[job.index("set -uo") :]
    line = next(line for line in job.splitlines() if line.startswith("srun "))
    assert shlex.split(line)[1:] == [
        "--kill-on-bad-exit=0", "--wait=600", "--cpus-per-task=6", *PROGRAM,
    ]  # fmt: skip
    assert by_a_shell(line) == shlex.split(line)
    assert "JAX_LOCAL_DEVICE_IDS" not in job


def test_slurm_one_process_per_node_owns_all_its_gpus():
    job = job_of(dry_run("slurm.sh", "--gpus=4", "--per=node"))
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=4\n" in job
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in job


@pytest.mark.parametrize(
    ("status", "restarted", "requeued"), [(0, 0, 0), (75, 0, 1), (75, 9, 1), (75, 10, 0), (1, 0, 0)]
)
def test_slurm_requeues_a_job_that_was_preempted(tmp_path, status, restarted, requeued):
    """What sbatch is given is run as it would be, with stand-ins for Slurm's programs."""
    env = stand_in(tmp_path, "sbatch", f"cat > {tmp_path}/job")
    stand_in(tmp_path, "srun", f'echo "$@" > {tmp_path}/ran\nexit {status}')
    stand_in(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    launch("slurm.sh", "--", "prog", "--a=b", env=env)
    env |= {**os.environ, **env, "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarted)}
    assert subprocess.run(["bash", tmp_path / "job"], env=env).returncode == status
    assert (tmp_path / "ran").read_text().endswith(" prog --a=b\n")
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == "requeue 42\n" * requeued


# -- Cloud TPU --


def test_tpu_pod_commands():
    wheel = "d/dec_diffusion-1.0-py3-none-any.whl"
    copy, install, ssh = words(dry_run("tpu_pod.sh", "--project=me", f"--install={wheel}"))
    where = ["--zone=us-west4-a", "--project=me", "--worker=all"]
    tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy == [*tpu_vm, "scp", wheel, "pod:", *where]
    assert install[:-1] == ssh[:-1] == [*tpu_vm, "ssh", "pod", *where]
    assert '"dec_diffusion[tpu] @ file://$HOME/dec_diffusion-1.0-py3-none-any.whl"' in install[-1]
    remote = ssh[-1].removeprefix("--command=")
    before, after = remote.split("; exec ")
    assert before == 'export PATH="$HOME/.dec_diffusion/bin:$PATH"'
    # The hosts' shell reads the words once more.
    assert shlex.split(after) == by_a_shell(after) == PROGRAM


def test_tpu_pod_installs_with_a_line_that_a_shell_understands():
    install = words(dry_run("tpu_pod.sh", "--install=dec_diffusion-1.0-py3-none-any.whl"))[1]
    script = install[-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert words(dry_run("tpu_pod.sh"))[0][4] == "ssh"


@pytest.mark.parametrize(
    ("state", "statuses", "restarts", "ends", "runs"),
    [
        ("READY", "75 75 0", 5, 0, 3),
        ("READY", "75 75 0", 1, 75, 2),
        ("READY", "75 3", 5, 3, 2),
        ("READY", "0", 5, 0, 1),
        ("PREEMPTED", "75 0", 5, 75, 1),
    ],
)
def test_tpu_pod_restarts_what_was_preempted(tmp_path, state, statuses, restarts, ends, runs):
    env = stand_in(
        tmp_path,
        "gcloud",
        f"""
case " $* " in
  *" describe pod "*) echo {state} ;;
  *)
    echo run >> {tmp_path}/runs
    set -- {statuses}
    shift "$(($(wc -l < {tmp_path}/runs) - 1))"
    exit "$1" ;;
esac""",
    )
    done = launch(
        "tpu_pod.sh",
        *NEEDED["tpu_pod.sh"],
        f"--restarts={restarts}",
        "--",
        "x",
        env=env,
        status=ends,
    )
    assert len((tmp_path / "runs").read_text().split()) == runs
    assert ("delete it, make it again" in done.stderr) == (state == "PREEMPTED")


# -- GKE --


def test_gke_commands():
    lines = words(dry_run("gke_xpk.sh", "--build", "--storage=bucket,scratch", "--restarts=7"))
    build, push, create = lines
    assert build == [
        "docker", "build", "--platform=linux/amd64", f"--file={LAUNCH / 'Dockerfile'}",
        "--tag=reg/i:1", str(ROOT),
    ]  # fmt: skip
    assert push == ["docker", "push", "reg/i:1"]
    assert create[:3] == ["xpk", "workload", "create"]
    assert {
        "--cluster=c", "--zone=us-west4-a", "--workload=job", "--tpu-type=v5litepod-16",
        "--num-slices=1", "--docker-image=reg/i:1", "--storage=bucket", "--storage=scratch",
        "--max-restarts=7", "--restart-on-exit-codes=75,76",
    } <= set(create)  # fmt: skip
    assert not any(word.startswith("--project") for word in create)
    remote = create[-1].removeprefix("--command=exec ")
    assert shlex.split(remote) == by_a_shell(remote) == PROGRAM
    assert len(words(dry_run("gke_xpk.sh"))) == 1


def test_gke_refuses_a_line_break_which_xpk_cannot_pass_on():
    done = launch("gke_xpk.sh", *NEEDED["gke_xpk.sh"], "--", "x", "a\nb", status=2)
    assert "line break" in done.stderr


def test_gke_stops_when_the_image_cannot_be_built(tmp_path):
    env = stand_in(tmp_path, "docker", "exit 4")
    stand_in(tmp_path, "xpk", f"touch {tmp_path}/created")
    launch("gke_xpk.sh", *NEEDED["gke_xpk.sh"], "--build", "--", "x", env=env, status=4)
    assert not (tmp_path / "created").exists()


def test_dockerfile_names_what_the_repository_has():
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY (.*)$", text, re.M) for w in line.split()[:-1]]
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert re.search(r"^ARG EXTRA=(\w+)$", text, re.M)[1] in extras and "cuda" in extras
    # What building the package reads.
    read = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    read |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"])
    assert read <= set(copied)
    python = re.search(r"^FROM python:([\d.]+)", text, re.M)[1]
    assert f"Programming Language :: Python :: {python}" in project["project"]["classifiers"]


# -- what the page beside the launchers says --


def commands_of_readme():
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.lstrip().startswith("launch/")]


def test_readme_commands_are_accepted():
    lines = commands_of_readme()
    assert {line.split()[0] for line in lines} == {f"launch/{name}" for name in NEEDED}
    for line in lines:
        program, *rest = shlex.split(line)
        mark = rest.index("--")
        launch(program.removeprefix("launch/"), *rest[:mark], "--dry-run", *rest[mark:])
        options.parse(["main", *[w for w in rest[mark:] if w.startswith("--") and len(w) > 2]])

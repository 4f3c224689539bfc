"""Every command line of README, of the notebooks and of the helps is run as it stands, in a folder laid out as the
pages assume.

A line is run for real where that takes seconds. It is only parsed, by the program's own parser up to the job, with
its configuration loaded, where a
real run would take hours or needs what a test has not:
- `pillsnap run` that trains (`all`, `interleaved`) or begins a run (no run folder is named): the whole path runs in
test_pipeline, the other in test_interleave;
- presets of real size (`--config two_stage`, `--config retrieval`), `train-stage` and `distributed`: trainings of
hours, or several processes;
- `create_splits` and `train` of the retrieval family: test_gallery runs them;
- `final-test` and `decide`, which open the sealed part of a run or write to its ledger for good: test_evaluation and
their notebooks run them;
- papermill on a training notebook: its parameters are checked and its job is made, but it is not trained;
- `make`, `pip`, `accelerate` and the scripts: parsed by make, by pip's pins, by accelerate's own parser, by the
script's `--help`.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path

import nbformat
import pytest
from terminal import search_path

from pillsnap import cli
from pillsnap.core.config import load_config
from pillsnap.core.runner import check_parameters, select_jobs

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("pillsnap", "papermill", "accelerate", "make", "python -m pillsnap", "python scripts", "pip install")
COMMANDS = {c.name or c.callback.__name__.replace("_", "-"): c for c in cli.app.registered_commands}
COMMANDS |= {f"ops {c.callback.__name__}": c for c in cli.ops.registered_commands}


def pages() -> dict[str, str]:
    "Prose by file: README, and the Markdown cells of every notebook."
    out = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for p in sorted((ROOT / "nbs").rglob("*.ipynb")):
        out[p.name] = "\n\n".join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "markdown")
    return out


@cache
def lines() -> dict[str, str]:
    "Command line → the page it stands on: fenced blocks, inline code, and the examples of the helps."
    found = {}
    for page, text in pages().items():
        fenced = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.S | re.M)
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        for line in [*(x for block in fenced for x in block.splitlines()), *inline]:
            line = re.sub(r"\s+#.*$", "", line).strip().removeprefix("$ ")
            if re.match(rf"(?:{'|'.join(map(re.escape, PROGRAMS))})(?:\s|$)", line):
                found.setdefault(line, page)
    for name, command in COMMANDS.items():
        found.setdefault(re.search(r"`(.+)`", command.epilog or "`pillsnap`")[1], f"pillsnap {name} --help")
    return found


def spelled_out(line: str) -> list[str]:
    """What a reader types for a line that stands for several: `[--json]` with and without, `single|combo` each,
    COMMAND every one."""
    if m := re.search(r"\[(--[^\]]+)\]", line):
        return [x for inside in (m[1], "") for x in spelled_out(line.replace(m[0], inside, 1))]
    if m := re.search(r"(?<=\s)([a-z]+(?:\|[a-z]+)+)(?=\s|$)", line):
        return [x for one in m[1].split("|") for x in spelled_out(line.replace(m[0], one, 1))]
    if re.search(r"\bCOMMAND\b", line):
        return [line.replace("COMMAND", name) for name in COMMANDS]
    return [" ".join(line.split())]


ALL = [(line, page) for text, page in lines().items() for line in spelled_out(text)]


def words(line: str, desk: Path) -> list[str]:
    "The words of a line, with the pages' stand-ins replaced by what lies on the desk."
    run_id = json.loads((desk / "RUN" / "run.json").read_text())["run_id"]
    stand_ins = {
        "DIR": "DIR",
        "PHOTOS": "data",
        "PHOTO": "photo.png",
        "OUT": "out.json" if " audit " in line else "out",
        "F": "demo",
        "key=value": "train.seed=7",
        "NAME=VALUE": "photo_mb=10",
        "RUN_ID": run_id,
    }
    return [
        stand_ins.get(w, w).replace("/where/the/delivery/is", str(desk / "data")).replace("/shared/run", "RUN")
        for w in shlex.split(line)
    ]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, smoke_run, gallery_run, strangers) -> Path:
    "A folder as the pages assume it: a zipped delivery in ./data, finished runs, a photo, a checkout's notebooks."
    from pillsnap.deployment.bundling import bundle_file
    from pillsnap.synth.writer import write_delivery

    root = tmp_path_factory.mktemp("desk")
    write_delivery(
        root / "data", drugs=4, photos=6, combos=2, width=122, height=160, zip_parts=True, workers=1, progress=False
    )
    shutil.copytree(smoke_run, root / "RUN", symlinks=True)
    for name in ("DIR", "RUN_A", "RUN_B", "_runs/demo", "_runs/two_stage", "_runs/x"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copytree(smoke_run, root / name, symlinks=True, ignore=shutil.ignore_patterns("delivery"))
        (root / name / "delivery").symlink_to(root / "RUN" / "delivery")
    (root / "RUN" / "artifacts" / "stage1").mkdir()
    for f in (root / "RUN" / "artifacts" / "stage0").glob("*"):
        shutil.copy2(f, root / "RUN" / "artifacts" / "stage1" / f.name)
    shutil.copy2(sorted((root / "RUN" / "delivery").rglob("*_75_*.png"))[0], root / "photo.png")
    shutil.copytree(gallery_run, root / "GALLERY", symlinks=True)
    for name, photo in zip(("front.jpg", "back.jpg"), strangers[0]):
        shutil.copy2(photo, root / name)
    for i, photo in enumerate(sorted((root / "RUN" / "delivery").rglob("K-*_75_*.png"))[:6]):
        (root / "photos" / f"pill {i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy2(photo, root / "photos" / f"pill {i % 2}" / f"{i}.png")
    bundle_file(root / "RUN", root / "pills.pillsnap")
    bundle_file(root / "RUN", root / "bare.pillsnap", thumbnails=False)
    server_home(root)
    (root / "nbs").symlink_to(ROOT / "nbs")
    for stage in cli.PIPELINE:
        (root / stage.path.name).symlink_to(stage.path)
    return root


def server_home(root: Path) -> None:
    "Two releases to go back from, and logs of a week and of a month ago."
    from pillsnap.deployment.releases import ReleaseHome

    for file in (root / "RUN", root / "bare.pillsnap"):
        ReleaseHome(root / "home").release(file)
    (root / "logs").mkdir()
    for day, days in (("2026-01-02", 40), ("2026-02-02", 10)):
        log = root / "logs" / f"server-{day}.jsonl"
        log.write_text('{"logger": "pillsnap.deployment.server", "message": "request"}\n')
        os.utime(log, (time.time() - 86_400 * days,) * 2)


@pytest.fixture
def at_the_desk(desk, monkeypatch, request) -> Path:
    """In that folder, with the delivery unpacked (README's own line does it for those after it) and measurements
    cut short."""
    from pillsnap import planner
    from pillsnap.delivery.archives import extract_archives

    monkeypatch.chdir(desk)
    if "extract" not in request.node.name and not list((desk / "data").rglob("*.json")):
        extract_archives(desk / "data", desk / "data")
    monkeypatch.setattr(planner, "seconds_left", lambda *a: 0.05)
    monkeypatch.setattr(cli, "_networks", lambda cfg: {})
    return desk


def typed(argv: list[str], capsys) -> tuple[int, str, str]:
    "Exit status and what was printed, of the program in this process."
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    said = capsys.readouterr()
    return e.value.code or 0, said.out, said.err


def stand_in_jobs(m, seen: dict) -> None:
    "Replace the jobs behind the commands: each writes what it was called with to `seen`, and does nothing else."
    from pillsnap.evaluation import final, ledger
    from pillsnap.training import distributed

    def pipeline(  # noqa: PLR0913 - stands in for run_pipeline
        stages, config, overrides, run_dir=None, only=None, start=None, force=False, fresh=False, params=None
    ):
        given = load_config(config, [*overrides, *([f"paths.exp_dir={json.dumps(str(run_dir))}"] if run_dir else [])])
        for stage in select_jobs(stages, only, start):
            check_parameters(stage.path, params or {})
        seen.update(cfg=given, jobs=[s.name for s in select_jobs(stages, only, start)])
        return [{"table": [], "verdict": ""}]

    def several(stage, run_dir, processes, config, overrides):
        given = load_config(config or str(Path(run_dir) / "config.yaml"), overrides)
        seen.update(cfg=given, jobs=[stage], processes=processes)

    def final_test(run_dir, **how):
        seen.update(cfg=load_config(str(cli.run_config(run_dir))), jobs=["final-test"], **how)

    def decide(run_dir, by, reason):
        seen.update(cfg=None, jobs=["decide"])
        return {"seq": 1, "by": by, "reason": reason}

    m.setattr(cli, "run_pipeline", pipeline)
    m.setattr(distributed, "distributed_command", several)
    m.setattr(final, "final_test_command", final_test)
    m.setattr(ledger, "record_decision", decide)
    m.setattr("pillsnap.training.presets.compare_with_target", lambda *a: "")


def parsed(argv: list[str], monkeypatch, capsys) -> dict:
    """What the job would be called with: typer reads every option, the job itself is left out, its configuration is
    loaded."""
    seen = {}
    with monkeypatch.context() as m:
        stand_in_jobs(m, seen)
        status, _, err = typed(argv, capsys)
    assert status == 0, err
    assert seen["jobs"], argv
    return seen


def only_parsed(argv: list[str]) -> bool:
    "Whether a real run would take hours, or change for good what a test must not."
    if argv[0] in ("train-stage", "distributed", "final-test", "decide", "create_splits", "train"):
        return True
    presets = {"two_stage", "retrieval", "narrow"} & set(argv)
    return argv[0] == "run" and (
        bool(presets) or argv[1] in ("all", "interleaved") or not {"--run", "--run-dir"} & set(argv)
    )


def without_papermill(monkeypatch) -> None:
    "The runner, with the job of a notebook done in this process."
    from pillsnap.core import runner

    monkeypatch.setattr(runner, "_execute", lambda stage, out, params, head: stage.job_class()(**params).run() and None)


# ---- the lines themselves


def test_the_pages_are_read():
    "An extraction that finds nothing would prove nothing."
    texts = [line for line, _ in ALL]
    for must in (
        "pillsnap extract ./data",
        "pillsnap run evaluation --run-dir _runs/demo -p user_choice=1",
        "pillsnap predict PHOTO --mode combo --run DIR --json",
        "papermill nbs/dataset/460_splits.ipynb out.ipynb -p run_dir _runs/demo -p seed 42",
        "pillsnap train-stage --help",
    ):
        assert must in texts, must
    assert len({p for _, p in ALL}) > 20 and len(set(texts)) == len(texts)


PILLSNAP = [(line, page) for line, page in ALL if line.startswith(("pillsnap", "python -m pillsnap"))]
KERNEL = "pillsnap run evaluation --run-dir _runs/demo -p user_choice=1"  # of README; run as a person runs it, below


@pytest.mark.spec("OP4", "CF8")
@pytest.mark.parametrize("line, page", PILLSNAP, ids=[line for line, _ in PILLSNAP])
def test_the_program_takes_every_line(line, page, at_the_desk, monkeypatch, capsys):
    argv = cli.arguments(words(line.replace("python -m pillsnap", "pillsnap"), at_the_desk)[1:])
    if not argv:
        assert typed([], capsys)[0] == 2  # help, and nothing was done
    elif " ".join(argv) in COMMANDS and any(p.required for p in params_of(" ".join(argv))):
        assert (
            typed([*argv, "--help"], capsys)[0] == 0
        )  # prose names the command; alone it would only miss its arguments
    elif "--help" not in argv and only_parsed(argv):
        parsed(argv, monkeypatch, capsys)
    elif argv[0] == "evaluate" and "test" in argv:
        status, _, err = typed(argv, capsys)
        assert status == 2 and "--reason" in err, "the sealed part is not opened without a reason"
    elif argv[0] == "serve" and "--help" not in argv:
        assert served(argv, at_the_desk) == 200
    elif line == KERNEL:
        done = subprocess.run(
            [sys.executable, "-m", "pillsnap", *argv],
            cwd=at_the_desk,
            env=os.environ | {"PYTHONPATH": search_path(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        advice = json.loads((at_the_desk / "_runs/demo/reports/advisor.json").read_text())
        assert advice["user_choice"] == advice["user_options"][0]["id"] and advice["choice"]["via"] == "parameter"
    else:
        without_papermill(monkeypatch)
        if argv[0] in ("enrol", "unenrol"):
            as_if_enrolled(at_the_desk, argv[0] == "unenrol")
        status, out, err = typed(argv, capsys)
        assert status == (0 if argv[0] != "doctor" else status) and status < 2, err
        assert out.strip(), "nothing was said"


def as_if_enrolled(desk: Path, before: bool) -> None:
    "A gallery in which nothing was enrolled, or the drug of the pages."
    from pillsnap.deployment.enrol import enrol_drug

    (desk / "GALLERY" / "export" / "gallery" / "journal.jsonl").unlink(missing_ok=True)
    if before:
        enrol_drug(desk / "GALLERY", "K-012345", [desk / "front.jpg", desk / "back.jpg"])


def served(argv: list[str], desk: Path) -> int:
    "Start the server with a key in .env and a free port; its status for /health, once it listens."
    (desk / ".env").write_text(f"API_KEY={'k' * 40}\nMODEL_PATH=RUN\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pillsnap", *argv, "--port", str(port)]
    with open(desk / "serve.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=desk, env=os.environ | {"PYTHONPATH": search_path(ROOT)}, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (desk / "serve.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    return answer.status
            except OSError:  # it does not listen yet, or listens and is not ready
                time.sleep(0.1)
        raise AssertionError((desk / "serve.log").read_text())
    finally:
        server.terminate()
        server.wait(30)


def params_of(name: str) -> list:
    "A command's parameters, as typer sees them."
    import typer

    command = typer.main.get_command(cli.app)
    for part in name.split():
        command = command.commands[part]
    return command.params


OTHERS = [(line, page) for line, page in ALL if (line, page) not in PILLSNAP]


@pytest.mark.spec("OP4", "BX15")
@pytest.mark.parametrize("line, page", OTHERS, ids=[line for line, _ in OTHERS])
def test_the_other_programs_take_every_line(line, page, at_the_desk, monkeypatch, capsys):
    argv = words(line, at_the_desk)
    if argv[0] == "make":
        done = subprocess.run(["make", "--dry-run", *argv[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif argv[0] == "pip":
        pip_installs(argv[2:])
    elif argv[0] == "python":
        help_ = subprocess.run([sys.executable, *argv[1:2], "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        for option in (w for w in argv if w.startswith("--")):
            assert option in help_, f"{argv[1]} has no {option}"
    elif argv[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(argv[2:])
        assert argv[1] == "launch" and launched.module and launched.training_script == "pillsnap"
        seen = parsed(launched.training_script_args, monkeypatch, capsys)
        assert seen["jobs"][0] in ("classifier", "detector")
    else:
        papermill_takes(argv, at_the_desk)


def pip_installs(wanted: list[str]) -> None:
    "Packages are pinned, and an extra of pillsnap is one that settings.ini names."
    pins, settings = (ROOT / "constraints.txt").read_text(), (ROOT / "settings.ini").read_text()
    for name in wanted[wanted.index("constraints.txt") + 1 :] if "constraints.txt" in wanted else wanted:
        extra = re.fullmatch(r"pillsnap\[(\w+)\]", name)
        known = rf"^{extra[1]}_requirements =" if extra else rf"^{re.escape(name)}=="
        assert name == "pillsnap" or re.search(known, settings if extra else pins, re.M), name


def papermill_takes(argv: list[str], desk: Path) -> None:
    "papermill's own parser reads the options; README's line is executed, a training is not."
    from papermill.cli import papermill as command

    context = command.make_context("papermill", list(argv[1:]))
    params = {k: int(v) if v.isdigit() else v for k, v in context.params["parameters"]}
    check_parameters(desk / context.params["notebook_path"], params)
    if "460_splits" in context.params["notebook_path"]:  # quick; a training would take minutes
        done = subprocess.run(
            [sys.executable, "-m", *argv],
            cwd=desk,
            env=os.environ | {"PYTHONPATH": search_path(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (desk / context.params["output_path"]).is_file()
        return
    stage = next(s for s in cli.PIPELINE if s.path.name == Path(context.params["notebook_path"]).name)
    job = stage.job_class()(**params)
    assert (desk / job.run_dir).is_dir() and job.cfg_in(desk / job.run_dir).train.seed == 42


# ---- help and exit statuses


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_helps(name, capsys):
    "A sentence, a word on every argument and option, an example."
    status, out, _ = typed([*name.split(), "--help"], capsys)
    assert status == 0 and "Usage: pillsnap " + name in out and "Example:" in out
    command = COMMANDS[name]
    assert len((command.callback.__doc__ or "").strip()) > 20 and re.search(rf"`pillsnap {name}\b", command.epilog)
    for p in params_of(name):
        assert getattr(p, "help", None), f"{name} {p.name} has no help"


@pytest.mark.spec("CF5")
@pytest.mark.parametrize(
    "argv, status",
    [
        (["--help"], 0),
        (["config"], 0),
        (["nosuch"], 2),
        (["run"], 2),
        (["config", "--nosuch"], 2),
        (["config", "train.sead=7"], 2),
        (["run", "splits", "--run-dir", "none"], 2),
        (["run", "evaluation", "--run-dir", "_runs/demo", "-p", "user_choice", "1"], 2),
        (["run", "evalution"], 2),
        (["predict", "none.png"], 2),
        (["doctor", "none"], 2),
    ],
)
def test_exit_statuses(argv, status, at_the_desk, capsys):
    got, out, err = typed(argv, capsys)
    assert got == status and bool(err) == (status == 2), (out, err)
    if err.startswith("pillsnap:"):
        assert err.count("\n  where:") <= 1 and err.count("\n  to do:") <= 1 and "Traceback" not in err
    assert not (at_the_desk / "none").exists()


def test_the_help_and_the_page_list_the_exit_statuses(capsys):
    page = nbformat.read(ROOT / "nbs" / "920_cli.ipynb", 4)
    table = "\n".join(c.source for c in page.cells if "| status | means |" in c.source)
    _, out, _ = typed(["--help"], capsys)
    said = " ".join(out.split()).partition("Exit status: ")[2]
    statuses = ["0", "1", "2", "3", "130"]
    assert re.findall(r"^\| (\d+) \|", table, re.M) == re.findall(r"(?:^|; )(\d+) ", said) == statuses


@pytest.mark.spec("CF5")
def test_ctrl_c_is_130_and_says_that_the_command_goes_on(monkeypatch, capsys):
    import pillsnap.doctor

    def stop(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(pillsnap.doctor, "doctor_command", stop)
    status, _, err = typed(["doctor"], capsys)
    assert status == 130 and err == "pillsnap: interrupted; the same command continues\n"

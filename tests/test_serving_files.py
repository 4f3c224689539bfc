"The examples for containers say what the program does: commands, ports, paths, limits, metric names, schemas."

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import kubernetes_validate
import pytest
import typer.main
import yaml

from pillsnap import cli
from pillsnap.deployment.server import router
from pillsnap.deployment.serversettings import ServerLimits, ServerSettings, parse_limits
from pillsnap.deployment.service import ServerMetrics

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "examples" / "serving"
ROUTES = {route.path for route in router.routes}


def steps() -> list[tuple[str, str]]:
    "The Dockerfile's instructions; continued lines joined."
    text = re.sub(r"\\\n\s*", "", (FILES / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def last(name: str) -> str:
    return [rest for step, rest in steps() if step == name][-1]


def served(args: list[str]) -> dict:
    "What the program's own parser makes of the arguments of `pillsnap serve`."
    command = typer.main.get_command(cli.app).commands["serve"]
    return command.make_context("serve", list(args)).params


def load(name: str) -> list:
    return [document for document in yaml.safe_load_all((FILES / name).read_text()) if document]


def kind(name: str) -> dict:
    (found,) = [d for d in load("kubernetes.yaml") if d["kind"] == name]
    return found


POD = kind("Deployment")["spec"]["template"]["spec"]
(BOX,) = POD["containers"]


def ignored(path: str) -> bool:
    "Whether the build does not see a file of the checkout: the last rule that fits decides."
    out = False
    for rule in (FILES / "Dockerfile.dockerignore").read_text().splitlines():
        rule = rule.strip()
        if rule and not rule.startswith("#"):
            negated, pattern = rule.startswith("!"), rule.lstrip("!").removeprefix("**/")
            names = {path, *(str(p) for p in Path(path).parents), Path(path).name}
            if any(fnmatch(name, pattern) for name in names):
                out = not negated
    return out


def test_the_image_is_built_from_files_that_are_there():
    sources = [w for step, rest in steps() if step == "COPY" and "--from" not in rest for w in rest.split()[:-1]]
    assert len(sources) >= 8 and all((ROOT / source).exists() for source in sources)
    assert not any(ignored(source) for source in sources)
    kept_out = ["_runs/demo/config.yaml", ".env", "pillsnap/.env", "tests/conftest.py", ".git/config", "a.pillsnap"]
    assert all(ignored(path) for path in kept_out)
    setup = (ROOT / "setup.py").read_text()
    for name in re.findall(r'here / "([\w.]+)"', setup):
        assert name in sources or not (ROOT / name).exists(), f"setup.py reads {name}"
    (extra,) = re.findall(r"/src\[(\w+)\]", " ".join(rest for _, rest in steps()))
    settings = (ROOT / "settings.ini").read_text()
    needs = re.search(rf"^{extra}_requirements = (.*)$", settings, re.M)[1]
    assert "uvicorn" in needs and "torch" not in needs


def test_the_image_runs_the_server_as_nobody():
    argv = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    assert argv[:2] == ["pillsnap", "serve"]
    asked = served(argv[2:])
    assert asked["auth"] and asked["host"] == "0.0.0.0" and asked["keep"] is None and asked["log_dir"] is None
    assert int(last("EXPOSE")) == asked["port"] == ServerSettings().port
    health = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", health[-1])
    assert int(url[1]) == asked["port"] and url[2] in ROUTES and health[:2] == ["python", "-c"]
    compile(health[2], "healthcheck", "exec")
    uid, gid = map(int, last("USER").split(":"))
    assert uid == gid >= 1000 and f"--uid {uid}" in " ".join(rest for _, rest in steps())
    order = [step for step, _ in steps()]
    assert order.index("USER") > max(i for i, step in enumerate(order) if step in ("RUN", "COPY"))


def test_compose_mounts_what_the_image_reads():
    (compose,) = load("compose.yaml")
    server, asked = compose["services"]["server"], served(json.loads(last("CMD")))
    build = (FILES / server["build"]["context"]).resolve()
    assert build == ROOT and (build / server["build"]["dockerfile"]).is_file()
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"] and server["user"] == last("USER")
    (models,) = server["volumes"]
    assert asked["bundle"].parent == Path(models.split(":")[1]) and models.endswith(":ro")
    (secret,) = server["secrets"]
    assert Path(secret["target"]) == asked["env_file"] and secret["source"] in compose["secrets"]
    reader = server["user"].split(":")[0]
    assert f"chown {reader} {secret['source']}" in (FILES / "compose.yaml").read_text(), "a mount keeps its owner"
    assert server["ports"] == [f"127.0.0.1:{asked['port']}:{asked['port']}"]
    assert int(server["stop_grace_period"].rstrip("s")) > ServerLimits().answer_seconds + 5
    assert asked["workers"] * asked["threads"] == server["cpus"], "each worker's threads have a CPU"
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            place = mount.split(":")[0]
            assert place == "./models" or (FILES / place).is_file()


@pytest.mark.parametrize("document", load("kubernetes.yaml"), ids=lambda d: d["kind"])
def test_the_manifests_fit_kubernetes_schemas(document):
    "Strictly: a field that Kubernetes does not know is an error, and so is a manifest that was spoiled."
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document, version, strict=True)
    for spoiled in (document | {"sppec": {}}, document | {"spec": document["spec"] | {"replica": "two"}}):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(spoiled, version, strict=True)


def test_the_pods_run_the_image_as_it_is_meant():
    asked = served(BOX["args"])
    own = served(json.loads(last("CMD")))
    assert {k: asked[k] for k in asked if k != "limit"} == {k: own[k] for k in own if k != "limit"}
    limits = parse_limits(asked["limit"])
    mounts = {m["mountPath"]: m for m in BOX["volumeMounts"]}
    assert mounts[str(asked["bundle"].parent)]["readOnly"] and mounts[str(asked["env_file"].parent)]["readOnly"]
    assert {m["name"] for m in mounts.values()} == {v["name"] for v in POD["volumes"]} and "/tmp" in mounts
    (port,) = BOX["ports"]
    assert port["containerPort"] == asked["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert BOX[probe]["httpGet"] == {"path": "/health", "port": port["name"]} and asked["health"]
    box, pod = BOX["securityContext"], POD["securityContext"]
    assert (
        box["readOnlyRootFilesystem"] and not box["allowPrivilegeEscalation"] and box["capabilities"]["drop"] == ["ALL"]
    )
    assert pod["runAsNonRoot"] and f"{pod['runAsUser']}:{pod['runAsGroup']}" == last("USER")
    wait = int(BOX["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > wait + limits.answer_seconds + 5
    start = BOX["startupProbe"]["periodSeconds"] * BOX["startupProbe"]["failureThreshold"]
    assert start >= 60, "as long as a worker may take to load a bundle"
    assert int(BOX["resources"]["requests"]["cpu"]) == asked["workers"] * asked["threads"]


def test_all_of_kubernetes_names_the_same_pods():
    deployment, service, scaler = kind("Deployment"), kind("Service"), kind("HorizontalPodAutoscaler")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == BOX["ports"][0]["name"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (
        scaler["spec"]["minReplicas"]
        >= deployment["spec"]["replicas"]
        > kind("PodDisruptionBudget")["spec"]["minAvailable"]
    )
    (relabel,) = [d for job in load("prometheus-kubernetes.yml") for d in job]
    kept = [rule["regex"] for rule in relabel["relabel_configs"] if rule.get("action") == "keep"]
    assert kept == [labels["app"], BOX["ports"][0]["name"]]


def test_the_metrics_that_are_read_are_written():
    "By the autoscaler, the adapter and the alerts; with the header that the server asks for."
    metrics = ServerMetrics()
    metrics.reloads.labels("refused")
    written = set(re.findall(r"^(pillsnap_\w+)", metrics.text().decode(), re.M))
    scaler = kind("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]
    (adapter,) = load("prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert scaler["metric"]["name"] == rule["name"]["as"] == rule["seriesQuery"].partition("{")[0]
    read = {scaler["metric"]["name"]}
    for alert in load("alerts.yml")[0]["groups"][0]["rules"]:
        read |= set(re.findall(r"pillsnap_\w+", alert["expr"]))
    assert len(read) == 3 and read <= written
    limits = parse_limits(served(BOX["args"])["limit"])
    assert int(scaler["target"]["averageValue"]) < limits.queue == ServerLimits().queue
    full = [a["expr"] for a in load("alerts.yml")[0]["groups"][0]["rules"] if "queue" in a["expr"]]
    assert full[0].endswith(f">= {limits.queue}")
    (scraped,) = load("prometheus.yml")
    for job in [*scraped["scrape_configs"], *(j for d in load("prometheus-kubernetes.yml") for j in d)]:
        assert list(job["http_headers"]) == ["X-API-Key"] and job["metrics_path"] in ROUTES
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in load("compose.yaml")[0]["services"] and int(port) == ServerSettings().port
    mounted = [v.split(":")[1] for v in load("compose.yaml")[0]["services"]["prometheus"]["volumes"]]
    assert all(f"/etc/prometheus/{name}" in mounted for name in scraped["rule_files"])


def test_the_comments_name_commands_that_exist():
    text = "\n".join(p.read_text() for p in sorted(FILES.iterdir()))
    named = re.findall(r"pillsnap ((?:ops )?[a-z]+) (?=FILE|RUN|--)", text)
    known = set(typer.main.get_command(cli.app).commands) | {
        f"ops {c.callback.__name__}" for c in cli.ops.registered_commands
    }
    assert named and set(named) <= known
    assert shlex.split(re.search(r"docker build (.*)$", text, re.M)[1])[1] == "examples/serving/Dockerfile"

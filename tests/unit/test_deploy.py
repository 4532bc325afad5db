"""The deployment files agree with the daemon and with what reads them: settings exist, stops outlast the drain, schemas
hold, linters are content.
"""

import base64
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from daemon import config
from daemon.cli.main import app
from daemon.domain import network
from daemon.worker.loop import FAREWELL_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FILES = [ROOT / "Dockerfile", *sorted(path for path in DEPLOY.rglob("*") if path.is_file())]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))

DEFAULTS: dict[str, Any] = {name: default for name, default, _ in config.described()}
SECRETS = {spec.name for spec in dataclasses.fields(config.Settings) if spec.metadata.get("is_secret")}
VARIABLES = {config.variable_of(name) for name in DEFAULTS} | {f"{config.variable_of(name)}_FILE" for name in SECRETS}
VALUES = {
    "database_url": "postgresql://tallyd:secret@postgres/tallyd",
    "secret_key": base64.b64encode(b"k" * 32).decode(),
}
STOP_S = DEFAULTS["drain_s"] + FAREWELL_S
KUBERNETES_VERSIONS = ("1.30", "1.37")  # the oldest with `preStop.sleep` on by default, and the newest with a schema


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|min)", text).groups()  # type: ignore[union-attr]  # None fails the test
    return int(number) * (60 if unit == "min" else 1)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)


def accept(env: dict[str, str], folder: Path) -> config.Settings:
    """What the daemon makes of an environment, with each secret file that it names replaced by one that exists."""
    given = dict(env)
    for variable in env:
        if variable.endswith("_FILE"):
            name = next(name for name in SECRETS if config.variable_of(name) == variable.removesuffix("_FILE"))
            given[variable] = str(folder / name)
            (folder / name).write_text(VALUES.get(name, "a-secret"))
    no_toml = folder / "no.toml"
    no_toml.touch()
    return config.load({}, given, no_toml)


# ── All of them ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_variable_that_is_named_is_a_setting(path) -> None:
    named = set(re.findall(r"\b(?:TALLYD|\w*QSTASH)_[A-Z][A-Z_]*\b", path.read_text("utf-8")))
    assert named - VARIABLES == set()


def commands() -> Iterator[tuple[str, list[str]]]:
    for path in UNITS:
        words = shlex.split(unit(path)["ExecStart"][0])
        yield path.name, words[words.index("/opt/tallyd/bin/tallyd") + 1 :]
    for manifest in manifests("Deployment"):
        yield manifest["metadata"]["name"], container(manifest)["args"]
    for instruction in re.findall(r'CMD \["tallyd", (.*)\]|^CMD \[(.*)\]', DOCKERFILE, re.MULTILINE):
        yield "Dockerfile", [word.strip(' "') for word in "".join(instruction).split(",")]


def test_every_command_exists_with_its_options() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # the root is a group
    found = list(commands())
    assert len(found) == 6
    for where, (command, *words) in found:
        assert command in known, where
        options = {option for param in known[command].params for option in param.opts}
        assert {word for word in words if word.startswith("-")} <= options, where


# ── Image ───────────────────────────────────────────────────────────────────────────────────────


def instructions(kind: str) -> list[str]:
    joined = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{kind}\s+(.*)$", joined, re.MULTILINE)


def image_env() -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(instructions("ENV")[-1]))


def test_dockerfile_passes_the_linter() -> None:
    result = run(str(Path(sys.executable).with_name("hadolint")), str(ROOT / "Dockerfile"))
    assert (result.returncode, result.stdout) == (0, "")


def test_image_runs_as_a_number_that_is_not_root() -> None:
    *_, user = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_image_holds_the_locked_dependencies_and_no_database() -> None:
    syncs = [line for line in instructions("RUN") if "uv sync" in line]
    assert len(syncs) == 2
    for line in syncs:
        assert {"--locked", "--no-dev", "--no-editable"} <= set(line.split())
        assert "--all-extras" not in line
    assert "embedded" not in "\n".join(instructions(r"[A-Z]+"))
    assert instructions("ARG").count('EXTRAS=""') == 1


def test_image_is_the_daemon_itself_and_tells_its_health() -> None:
    assert instructions("ENTRYPOINT") == ['["tallyd"]']  # the exec form: no shell stands between SIGTERM and the daemon
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert 'CMD ["tallyd", "healthcheck"]' in instructions("HEALTHCHECK")[0]
    assert image_env()["TALLYD_LISTEN"].endswith(f":{instructions('EXPOSE')[0]}")


def test_build_context_is_a_list_of_what_is_allowed() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]}
    assert rules[0] == "*"
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


# ── Compose ─────────────────────────────────────────────────────────────────────────────────────


def test_compose_settings_are_accepted(tmp_path) -> None:
    settings = accept(
        {"TALLYD_LISTEN": image_env()["TALLYD_LISTEN"], **COMPOSE["services"]["tallyd"]["environment"]}, tmp_path
    )
    assert None not in (settings.database_url, settings.secret_key, settings.metrics_token)


def test_compose_waits_for_the_drain() -> None:
    assert seconds(COMPOSE["services"]["tallyd"]["stop_grace_period"]) > STOP_S


def test_compose_publishes_on_loopback_alone_with_room_for_replicas() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len(ports) == 1
    assert "-" in ports[0].split(":")[1], "one port on the host serves one replica"
    assert "container_name" not in COMPOSE["services"]["tallyd"]
    assert COMPOSE["networks"]["database"] == {"internal": True}


def test_compose_confines_its_services() -> None:
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
        assert {p for p in service["environment"].values() if p.startswith("/run/secrets/")} == {
            f"/run/secrets/{name}" for name in service["secrets"]
        }
    daemon = COMPOSE["services"]["tallyd"]
    assert daemon["read_only"] is True
    assert daemon["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert "healthcheck" in COMPOSE["services"]["postgres"]
    assert "/secrets/" in (DEPLOY / ".gitignore").read_text("utf-8").splitlines()


# ── systemd ─────────────────────────────────────────────────────────────────────────────────────


def unit(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def placed(path: Path, folder: Path) -> str:
    """A copy whose program exists, under a name that systemd takes for an instance where it is a template."""
    copy = folder / path.name
    copy.write_text(path.read_text("utf-8").replace("/opt/tallyd/bin/tallyd", shutil.which("true") or "/bin/true"))
    return str(copy)


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
@pytest.mark.parametrize("path", UNITS, ids=relative)
def test_systemd_finds_nothing_to_say_about_the_unit(path, tmp_path) -> None:
    result = run("systemd-analyze", "verify", placed(path, tmp_path))
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("path", UNITS, ids=relative)
def test_systemd_rates_the_exposure_as_low(path, tmp_path) -> None:
    result = run("systemd-analyze", "security", "--offline=true", "--threshold=15", placed(path, tmp_path))
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("path", UNITS, ids=relative)
def test_unit_waits_for_the_drain_and_is_watched(path) -> None:
    has = unit(path)
    assert seconds(has["TimeoutStopSec"][0]) > STOP_S
    assert (has["Type"], has["NotifyAccess"], has["Restart"]) == (["notify"], ["main"], ["on-failure"])
    assert seconds(has["WatchdogSec"][0]) >= 30


@pytest.mark.parametrize("path", UNITS, ids=relative)
def test_unit_needs_two_credentials_and_offers_the_others(path) -> None:
    credentials = dict(value.split(":", 1) for value in unit(path)["LoadCredential"])
    assert set(credentials) <= SECRETS
    needed = {name for name, source in credentials.items() if source.startswith("/")}
    assert needed == {"database_url", "secret_key"}
    assert {Path(source).name for source in credentials.values()} == {f"tallyd.{name}" for name in credentials}


def test_units_are_confined_alike() -> None:
    """The worker's unit repeats the daemon's, since a template inherits from nothing."""
    own = {"Description", "ExecStart", "UnsetEnvironment", "Environment", "StateDirectory", "StateDirectoryMode"}
    first, second = ({key: value for key, value in unit(path).items() if key not in own} for path in UNITS)
    assert first == second


def test_worker_unit_takes_no_port() -> None:
    has = unit(DEPLOY / "systemd/tallyd-worker@.service")
    assert "TALLYD_LISTEN=none" in has["ExecStart"][0].split()
    assert has["UnsetEnvironment"] == ["TALLYD_LISTEN_PRIVATE"]


def test_every_line_of_the_example_environment_is_accepted(tmp_path) -> None:
    text = (DEPLOY / "systemd/tallyd.env.example").read_text("utf-8")
    lines = dict(line.split("=", 1) for line in re.findall(r"^#?([A-Z_]+=\S+)$", text, re.MULTILINE))
    assert len(lines) > 5
    secrets = ("database_url", "secret_key", "qstash_current_signing_key", "qstash_next_signing_key")
    accept(lines | {f"{config.variable_of(name)}_FILE": "" for name in secrets}, tmp_path)


# ── Kubernetes ──────────────────────────────────────────────────────────────────────────────────


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


MANIFESTS = [
    document
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name != "kustomization.yaml" and not path.stem.endswith("-patch")
    for document in documents(path)
]


def manifests(kind: str) -> list[dict[str, Any]]:
    return [document for document in MANIFESTS if document["kind"] == kind]


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (only,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(manifest: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifest).get("env", [])}


def titled(value: object) -> str:
    return f"{value['kind']}-{value['metadata']['name']}" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if "keda.sh" not in m["apiVersion"]], ids=titled)
def test_manifest_fits_the_schema(manifest, version) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("manifest", manifests("Deployment"), ids=titled)
def test_pod_is_confined_and_waits_for_the_drain(manifest) -> None:
    pod, main = manifest["spec"]["template"]["spec"], container(manifest)
    assert pod["terminationGracePeriodSeconds"] > main["lifecycle"]["preStop"]["sleep"]["seconds"] + STOP_S
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "the Service's variables would be unknown settings"
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == instructions("USER")[-1]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    own = main["securityContext"]
    assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert main["resources"].keys() == {"requests", "limits"}


@pytest.mark.parametrize("manifest", manifests("Deployment"), ids=titled)
def test_pod_is_asked_where_it_listens(manifest) -> None:
    main = container(manifest)
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    assert environment(manifest)["TALLYD_LISTEN"] == f"0.0.0.0:{ports['http']}"
    asked = {probe: main[f"{probe}Probe"]["httpGet"] for probe in ("startup", "readiness", "liveness")}
    assert {get["port"] for get in asked.values()} == {"http"}
    assert [get["path"] for get in asked.values()] == ["/readyz", "/readyz", "/healthz"]


@pytest.mark.parametrize("with_qstash", [False, True])
@pytest.mark.parametrize("manifest", manifests("Deployment"), ids=titled)
def test_settings_of_the_pod_are_accepted_and_its_secrets_exist(manifest, with_qstash, tmp_path) -> None:
    env = environment(manifest)
    if with_qstash:
        (patch,) = documents(KUBERNETES / "qstash/deployment-patch.yaml")
        env |= environment(patch)
    accept(env, tmp_path)
    keys = {Path(value).name for name, value in env.items() if name.endswith("_FILE")}
    (volume,) = (v["secret"] for v in manifest["spec"]["template"]["spec"]["volumes"] if "secret" in v)
    (secret,) = (s for s in manifests("Secret") if s["metadata"]["name"] == volume["secretName"])
    assert keys <= set(secret["stringData"]) <= SECRETS


def test_example_secrets_are_placeholders() -> None:
    for secret in manifests("Secret"):
        assert all("REPLACE_ME" in value for value in secret["stringData"].values())


def test_selectors_find_their_pods_and_everything_is_in_one_namespace() -> None:
    labels = [manifest["spec"]["template"]["metadata"]["labels"] for manifest in manifests("Deployment")]
    selectors = [manifest["spec"]["selector"] for manifest in manifests("Service")]
    selectors += [
        m["spec"]["selector"]["matchLabels"] for m in manifests("PodDisruptionBudget") + manifests("Deployment")
    ]
    assert len(selectors) == 5
    for selector in selectors:
        assert sum(selector.items() <= of_pod.items() for of_pod in labels) == 1
    (space,) = manifests("Namespace")
    assert {m["metadata"].get("namespace") for m in MANIFESTS if m is not space} == {space["metadata"]["name"]}


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("kustomization.yaml")), ids=relative)
def test_kustomization_names_every_file_beside_it(path) -> None:
    (document,) = documents(path)
    named = {*document["resources"], *(patch["path"] for patch in document.get("patches", []))}
    there = {file.name for file in path.parent.glob("*.yaml")} - {"kustomization.yaml", "secret.example.yaml"}
    assert named == there


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    "components",
    [[], ["keda"], ["qstash"], ["keda", "qstash"], ["messages"], ["messages", "publish"],
     ["keda", "qstash", "messages", "publish"]],
    ids="+".join,
)  # fmt: skip
def test_kustomize_builds_the_daemon_with_any_components(components, tmp_path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "base")
    overlay = {"resources": ["base"], "components": [f"base/{name}" for name in components]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    result = run("kubectl", "kustomize", str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    built = [document for document in yaml.safe_load_all(result.stdout) if "keda.sh" not in document["apiVersion"]]
    for document in built:
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
    for document in (document for document in built if document["kind"] == "Deployment"):
        port = "private" if "qstash" in components else "http"
        assert container(document)["readinessProbe"]["httpGet"]["port"] == port


def test_messages_leave_only_where_the_component_lets_them() -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests("NetworkPolicy")}
    base, messages = policies["tallyd"], policies["tallyd-messages"]
    assert messages["podSelector"] == base["podSelector"], "workers deliver too"
    assert {port["port"] for rule in base["egress"] for port in rule["ports"]} == {53, 5432, 443}
    public, cluster = messages["egress"]
    assert "ports" not in public | cluster, "receivers have any port"
    closed = [ip_network(block) for peer in public["to"] for block in peer["ipBlock"]["except"]]
    private = {network.METADATA, network.PRIVATE, network.SHARED, network.LINK_LOCAL}
    for block in (ip_network(block) for block, kind in network._SPECIAL if kind in private):
        assert any(block.version == other.version and block.subnet_of(other) for other in closed), block
    [peer] = cluster["to"]
    assert peer["namespaceSelector"]["matchLabels"], "an empty selector would be all namespaces"


def test_ingresses_share_a_host_and_lead_to_the_service_by_the_paths_that_are_meant_for_it() -> None:
    [service] = manifests("Service")
    paths = {}
    for ingress in manifests("Ingress"):
        [rule] = ingress["spec"]["rules"]
        [tls] = ingress["spec"]["tls"]
        assert tls["hosts"] == [rule["host"]] == ["tallyd.example"]
        [path] = rule["http"]["paths"]
        paths[ingress["metadata"]["name"]] = path["path"]
        backend = path["backend"]["service"]
        assert backend["name"] == service["metadata"]["name"]
        assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert paths == {"tallyd": "/api/", "tallyd-v2": "/v2/"}


def test_memory_limits_hold_what_the_settings_let_a_process_hold() -> None:
    """Beyond that the kernel kills it, in the midst of deliveries."""
    at_rest, deliveries, incoming = 100 << 20, 2 * DEFAULTS["push_bytes_max"], DEFAULTS["v2_bytes_max"]
    units = {"Gi": 1 << 30, "Mi": 1 << 20, "g": 1 << 30, "m": 1 << 20}
    limits = {titled(m): container(m)["resources"]["limits"]["memory"] for m in manifests("Deployment")}
    limits["compose"] = COMPOSE["services"]["tallyd"]["mem_limit"]
    for where, limit in limits.items():
        number, letters = re.fullmatch(r"(\d+)(\w+)", limit).groups()  # type: ignore[union-attr]  # None fails the test
        assert int(number) * units[letters] > 1.25 * (at_rest + deliveries + incoming), where
    assert not any("MemoryMax" in unit(path) for path in UNITS)


# ── Workers by the depth of the queue ───────────────────────────────────────────────────────────


def scaler() -> tuple[dict[str, Any], dict[str, str]]:
    (scaled,) = manifests("ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    (authentication,) = manifests("TriggerAuthentication")
    assert trigger["type"] == "postgresql"
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (reference,) = authentication["spec"]["secretTargetRef"]
    assert any(
        secret["metadata"]["name"] == reference["name"] and reference["key"] in secret["stringData"]
        for secret in manifests("Secret")
    )
    return scaled, trigger["metadata"]


def deployment(name: str) -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests("Deployment") if manifest["metadata"]["name"] == name)
    return found


def test_workers_are_scaled_by_what_one_process_runs_at_once() -> None:
    scaled, metadata = scaler()
    worker = deployment(scaled["spec"]["scaleTargetRef"]["name"])
    assert "replicas" not in worker["spec"], "each apply would undo what KEDA has set"
    assert int(metadata["targetQueryValue"]) == DEFAULTS["concurrency"]
    daemons = deployment("tallyd")["spec"]["replicas"]
    assert int(metadata["activationTargetQueryValue"]) == daemons * DEFAULTS["concurrency"]
    assert scaled["spec"]["cooldownPeriod"] >= DEFAULTS["tick_seconds"]


def test_query_of_the_depth_reads_tables_that_exist() -> None:
    _, metadata = scaler()
    schema = (ROOT / "daemon/db/schema.sql").read_text("utf-8")
    tables = set(re.findall(r"from (\w+)", metadata["query"]))
    assert tables == {"ready", "lease"}
    assert tables <= set(re.findall(r"create table (\w+)", schema))


def test_the_most_replicas_fit_into_the_default_connections_of_postgres() -> None:
    """100, of which 3 are the superuser's, and 5 for the scaler and for people."""
    scaled, _ = scaler()
    needed = 0
    for name, replicas in (
        ("tallyd", deployment("tallyd")["spec"]["replicas"]),
        ("tallyd-worker", scaled["spec"]["maxReplicaCount"]),
    ):
        manifest = deployment(name)
        surge = manifest["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        pool = int(environment(manifest).get("TALLYD_DATABASE_POOL_MAX", DEFAULTS["database_pool_max"]))
        needed += (replicas + surge) * (pool + 2)
    assert needed <= 100 - 3 - 5

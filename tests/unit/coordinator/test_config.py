"""The configuration: what is read, and that every mistake is told with its key and what to write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.config import SECTIONS, Configuration, configuration_path, load, parse
from coordinator.config_section import ssh_target
from coordinator.errors import ConfigError, UnknownHost, UnknownWorkload
from coordinator.facts import MoverSpec, RouterSpec, VolumeSpec, WorkloadSpec
from coordinator.protocol import Deadlines, MemoryPolicy
from coordinator.wire import encode
from tests.unit.coordinator.samples import HOSTS, WORKLOADS, configuration, host_section, write_keys

ROOT = Path(__file__).parents[3]
VOLUME = "[[workloads.echo.volumes]]\n"


def problems_of(text: str, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, folder / "livemove.toml")
    first, *rest = caught.value.message.split("\n  ")
    assert first.startswith(str(folder / "livemove.toml"))
    return rest or [first.split(": ", 1)[1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    return tmp_path


def test_a_whole_configuration(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert list(config.hosts) == ["alpha", "beta", "gamma"]
    alpha = config.host("alpha")
    assert (alpha.user, alpha.address, alpha.port, alpha.interface) == ("root", "192.0.2.11", 22, "eth0")
    assert alpha.channel_address == "192.0.2.11"
    assert alpha.key == tmp_path / "keys/operator"
    assert config.workload("counter") == WorkloadSpec(
        name="counter", runtime="runc", container="counter", bundle="/srv/counter", addresses=("192.0.2.200/24",)
    )
    assert config.workload("echo").pid_file == "/run/echo.pid"
    assert config.policy.deadlines == Deadlines()


def test_policy_and_channel_address(folder: Path) -> None:
    text = HOSTS + 'channel_address = "198.51.100.13"\n' + "[policy]\nfreeze_s = 5\nsettle_s = 0.25\n"
    config = parse(text, folder / "livemove.toml")
    assert config.policy.deadlines == Deadlines(freeze_s=5.0, settle_s=0.25)
    assert config.host("gamma").channel_address == "198.51.100.13"


def test_movers(folder: Path) -> None:
    text = HOSTS + WORKLOADS + 'mover = "route"\nrouter = "admin@192.0.2.1:2222"\nrouter_key = "/etc/key"\n'
    config = parse(text, folder / "livemove.toml")
    assert config.workload("counter").mover == MoverSpec()
    router = RouterSpec(address="192.0.2.1", user="admin", port=2222, key="/etc/key")
    assert config.workload("echo").mover == MoverSpec(kind="route", router=router)
    text = HOSTS + WORKLOADS + 'mover = "hook"\nhook = "/usr/local/sbin/move"\n'
    mover = parse(text, folder / "livemove.toml").workload("echo").mover
    assert mover == MoverSpec(kind="hook", hook="/usr/local/sbin/move")


def test_files(folder: Path) -> None:
    text = WORKLOADS.replace("bundle", 'files = "present"\nbundle')
    text += f'{VOLUME}path = "/srv/echo/data/"\nfiles = "shared"\n{VOLUME}path = "/srv/echo/data2"\nfiles = "present"\n'
    config = parse(HOSTS + text, folder / "livemove.toml")
    assert (config.workload("counter").files, config.workload("counter").volumes) == ("present", ())
    assert config.workload("echo").files == "unchecked"
    assert config.workload("echo").volumes == (
        VolumeSpec(path="/srv/echo/data", files="shared"),
        VolumeSpec(path="/srv/echo/data2", files="present"),
    )


@pytest.mark.parametrize(
    ("text", "user", "address", "port"),
    [
        ("192.0.2.11", "root", "192.0.2.11", 22),
        ("admin@host.example:2222", "admin", "host.example", 2222),
        ("2001:db8::11", "root", "2001:db8::11", 22),
        ("root@2001:db8:0::11", "root", "2001:db8::11", 22),
        ("root@[2001:db8::11]:2222", "root", "2001:db8::11", 2222),
    ],
)
def test_ssh_targets(text: str, user: str, address: str, port: int) -> None:
    target = ssh_target(text)
    assert (target.user, target.address, target.port) == (user, address, port)


@pytest.mark.parametrize(
    "text",
    ["", "@", "root@", "root@host:", "host:0", "host:65536", "host:x", "300.1.2.3", "[nothing]:22", "a b", "[::1"],
)
def test_bad_ssh_targets(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        ssh_target(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "hosts: missing; write a [hosts.NAME] section"),
        (HOSTS + "[polcy]\n", "polcy: unknown key; did you mean 'policy'?"),
        (HOSTS + "interfce = 1\n", "hosts.gamma.interfce: unknown key; did you mean 'interface'?"),
        ("hosts = 3\n", "hosts: must be a section, not a number; write [hosts]"),
        ("[hosts]\nalpha = 3\n", "hosts.alpha: must be a section; write [hosts.alpha]"),
        (host_section('"a b"', 11), "hosts.'a b': not a name"),
        (
            HOSTS.replace('"eth0"', "true", 1),
            'hosts.alpha.interface: must be a text, not a truth value; write interface = "eth0"',
        ),
        (HOSTS.replace('"eth0"', '"eth0/1"', 1), "hosts.alpha.interface: 'eth0/1' will not do"),
        (HOSTS.replace("keys/operator", "keys/none", 1), "hosts.alpha.key: no such file:"),
        (HOSTS.replace("keys/operator", "keys/\\u0000", 1), "hosts.alpha.key: '"),
        (HOSTS.replace("keys/known_hosts", "keys", 1), "hosts.alpha.known_hosts: no such file:"),
        (HOSTS.replace("root@192.0.2.11", "root@", 1), "hosts.alpha.ssh: 'root@' is no ssh target; write"),
        (HOSTS + 'channel_address = "a b"\n', "hosts.gamma.channel_address: 'a b' is no IP address"),
        (
            HOSTS + "[policy]\nfreeze_s = 0\n",
            "policy.freeze_s: must be a number of seconds above 0, at most 86400; write freeze_s = 60.0",
        ),
        (HOSTS + "[policy]\nfreeze_s = nan\n", "policy.freeze_s: must be a number of seconds"),
        (HOSTS + "[policy]\nfreeze_s = true\n", "policy.freeze_s: must be a number of seconds"),
        (HOSTS + '[policy]\nfreeze = "x"\n', "policy.freeze: unknown key; did you mean 'freeze_s'?"),
        (
            HOSTS + WORKLOADS.replace('"runc"', '"runcc"'),
            "workloads.counter.runtime: 'runcc' is no runtime; did you mean 'runc'?",
        ),
        (
            HOSTS + WORKLOADS.replace('container = "counter"\n', ""),
            'workloads.counter.container: missing; write container = "counter"',
        ),
        (
            HOSTS + WORKLOADS.replace('"runc"', '"crun"').replace('container = "counter"\n', "root_pid = 7\n"),
            'workloads.counter.root_pid: not allowed with runtime = "crun"; remove it, or write runtime = "process"',
        ),
        (HOSTS + WORKLOADS.replace('"/srv', '"srv'), "workloads.counter.bundle: 'srv/counter' is not an absolute path"),
        (
            HOSTS + WORKLOADS.replace("pid_file", "bundle"),
            'workloads.echo.bundle: not allowed with runtime = "process"',
        ),
        (
            HOSTS + WORKLOADS + 'mover = "rout"\n',
            'workloads.echo.mover: \'rout\' is none of "l2", "route", "hook"; did you mean \'route\'?',
        ),
        (HOSTS + WORKLOADS + 'mover = "hook"\n', 'workloads.echo.hook: missing; write hook = "/usr/local/sbin/'),
        (HOSTS + WORKLOADS + 'mover = "hook"\nhook = "x"\n', "workloads.echo.hook: 'x' is not an absolute path"),
        (HOSTS + WORKLOADS + 'hook = "/x"\n', 'workloads.echo.hook: not allowed with mover = "l2"; remove it, or'),
        (HOSTS + WORKLOADS + 'mover = "route"\n', 'workloads.echo.router: missing; write router = "root@192.0.2.1"'),
        (HOSTS + WORKLOADS + 'mover = "route"\nrouter = "@"\n', "workloads.echo.router: '@' is no ssh target; write"),
        (
            HOSTS + WORKLOADS + 'mover = "route"\nrouter = "r"\nrouter_key = "k"\n',
            "workloads.echo.router_key: 'k' is not an absolute path",
        ),
        (
            HOSTS + WORKLOADS + 'files = "shared"\n',
            'workloads.echo.files: not allowed with runtime = "process": of a process nobody knows the directories; '
            "name each in [[workloads.echo.volumes]]",
        ),
        (
            HOSTS + WORKLOADS.replace("bundle", 'files = "synced"\nbundle'),
            'workloads.counter.files: \'synced\' is none of "unchecked", "shared", "present", "sync"',
        ),
        (HOSTS + WORKLOADS + 'volumes = "/srv"\n', "workloads.echo.volumes: must be a list of sections; write [[work"),
        (HOSTS + WORKLOADS + VOLUME + 'pth = "/"\n', "workloads.echo.volumes[0].pth: unknown key; did you mean 'path'"),
        (HOSTS + WORKLOADS + VOLUME + 'files = "sync"\n', "workloads.echo.volumes[0].path: missing; write path = "),
        (HOSTS + WORKLOADS + VOLUME + 'path = "/srv"\n', 'workloads.echo.volumes[0].files: missing; write files = "sy'),
        (
            HOSTS + WORKLOADS + "".join(f'{VOLUME}path = "{path}"\nfiles = "shared"\n' for path in ("/a/b/../b", "/a")),
            "workloads.echo.volumes[1]: /a and /a/b are one in the other; remove one of them",
        ),
        (HOSTS + WORKLOADS + "root_pid = 5\n", "workloads.echo.root_pid: not allowed together with pid_file"),
        (HOSTS + WORKLOADS.replace('pid_file = "/run/echo.pid"', ""), "workloads.echo.pid_file: missing; write"),
        (
            HOSTS + WORKLOADS.replace('pid_file = "/run/echo.pid"', "root_pid = 1"),
            "workloads.echo.root_pid: must be a whole number from 2",
        ),
        (
            HOSTS + WORKLOADS.replace('["192.0.2.201/24"]', "[]"),
            "workloads.echo.addresses: must be a list of at least one",
        ),
        (
            HOSTS + WORKLOADS.replace('["192.0.2.201/24"]', "[7]"),
            "workloads.echo.addresses: must be a list of at least one",
        ),
        (HOSTS + WORKLOADS.replace('addresses = ["192.0.2.201/24"]', ""), "workloads.echo.addresses: missing; write"),
        (
            HOSTS + WORKLOADS.replace(".201/24", ".201"),
            "workloads.echo.addresses[0]: '192.0.2.201' has no prefix length; write for example \"192.0.2.201/24\"",
        ),
        (
            HOSTS + WORKLOADS.replace(".201/24", ".201/33"),
            "workloads.echo.addresses[0]: '192.0.2.201/33' is no address in CIDR form",
        ),
        (
            HOSTS + WORKLOADS.replace(".201/24", ".0/24"),
            "workloads.echo.addresses[0]: '192.0.2.0/24' is the network's own",
        ),
        (
            HOSTS + WORKLOADS.replace("192.0.2.201/24", "127.0.0.1/8"),
            "workloads.echo.addresses[0]: '127.0.0.1/8' cannot move",
        ),
        (
            HOSTS + WORKLOADS.replace("201/24", "200/24"),
            "workloads.echo.addresses[0]: 192.0.2.200 is in workloads.counter.addresses[0] already",
        ),
        (
            HOSTS + WORKLOADS.replace("201/24", "11/24"),
            "workloads.echo.addresses[0]: 192.0.2.11 is the ssh address of hosts.alpha already",
        ),
    ],
)
def test_each_mistake_is_named(text: str, expected: str, folder: Path) -> None:
    found = problems_of(text, folder)
    assert any(each.startswith(expected) for each in found), found


def test_all_problems_are_shown_together(folder: Path) -> None:
    text = HOSTS.replace('"eth0"', "1", 1) + "speed = 3\n[policy]\nfreeze_s = -1\n"
    assert {each.split(":")[0] for each in problems_of(text, folder)} == {
        "hosts.alpha.interface",
        "hosts.gamma.speed",
        "policy.freeze_s",
    }


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[hosts.alpha]\nssh = \n", ":2:7: not TOML"),
        ("a = 1\na = 2\n", ":2:6: not TOML"),
        ("a = " + "[" * 9000, ": nested too deeply"),
    ],
)
def test_toml_mistakes_have_a_place(text: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, tmp_path / "x.toml")
    assert caught.value.message.startswith(f"{tmp_path / 'x.toml'}{where}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        load(tmp_path / "none.toml")
    assert "--config" in caught.value.hint
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "binary.toml", Path("a\0b")):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(path)


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    with pytest.raises(UnknownHost, match=r"no host 'betta' \(there are: alpha, beta, gamma\); did you mean 'beta'"):
        config.host("betta")
    with pytest.raises(UnknownWorkload, match="no workload 'x'"):
        config.workload("x")


def test_which_file_is_read() -> None:
    assert configuration_path(None, {}) == Path("livemove.toml")
    assert configuration_path(None, {"LIVEMOVE_CONFIG": "/etc/livemove.toml"}) == Path("/etc/livemove.toml")
    assert configuration_path("x.toml", {"LIVEMOVE_CONFIG": "/etc/livemove.toml"}) == Path("x.toml")


_scalars = st.one_of(
    st.text(max_size=20).map(lambda text: '"' + re.sub(r'[\\"\x00-\x1f\x7f]', "_", text) + '"'),
    st.sampled_from(
        ['"192.0.2.200/24"', '"runc"', '"process"', '"root@[::1]:22"', '"~nobody-at-all/x"', '"a\\u0000b"']
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["true", "1979-05-27", "[]", "[[1]]", "{}", '["192.0.2.1/24", "::1/64"]', "{a = 1}"]),
)
_keys = st.sampled_from(sorted({key for keys in SECTIONS.values() for key in keys} | {"hosts", "other", '"x y"', '""'}))
_headers = st.sampled_from(
    ["hosts", "hosts.a", "workloads.a", "workloads.b", "policy", "policy.x", 'hosts."x y"', "other"]
)
_sections = st.tuples(_headers, st.dictionaries(_keys, _scalars, max_size=6))


def _toml(sections: list[tuple[str, dict[str, str]]]) -> str:
    return "\n".join(f"[{name}]\n" + "\n".join(f"{k} = {v}" for k, v in keys.items()) for name, keys in sections)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.lists(_sections, max_size=4, unique_by=lambda each: each[0]).map(_toml)))
def test_no_text_makes_anything_but_a_configuration_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(parse(text, Path("livemove.toml")), Configuration)
    except ConfigError as error:
        assert "livemove.toml" in error.message


def test_the_documentation_has_every_key_and_no_other() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    documented = {}
    for title, body in re.findall(r"^## `\[(\w+)[^\n]*\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        documented[title] = set(re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE))
    assert documented == {section: set(keys) for section, keys in SECTIONS.items()}


def test_the_documentation_has_the_defaults_of_the_policy() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    usual = {**encode(MemoryPolicy()), "mode": "auto"}
    for name, value in encode(Deadlines()).items():
        assert f"| `{name}` | seconds | {value} |" in page
    for name, value in usual.items():
        assert re.search(rf'\| `{name}` \| [a-z ]+ \| `?"?{value}"?`? \|', page), name


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('mode = "warp"', "policy.mode: 'warp' is none of"),
        ('give_up = "frezee"', "did you mean"),
        ("max_freeze_ms = 0", "milliseconds"),
        ("max_rounds = 0", "whole number from 1 to 100"),
        ('max_factor = "much"', "max_factor"),
    ],
)
def test_a_wrong_memory_policy_is_named(line: str, what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)):
        parse(f"[policy]\n{line}\n", Path("x.toml"))


def test_the_command_line_overrides_the_memory_policy(folder: Path) -> None:
    config = parse(f'{HOSTS}\n[policy]\nmode = "hybrid"\nmax_freeze_ms = 80\n', folder / "x.toml")
    assert config.with_memory(mode=None, max_freeze_ms=None, give_up=None) == config
    changed = config.with_memory(mode="stop-copy", max_freeze_ms=20.0, give_up="abort").policy
    assert (changed.mode, changed.memory.max_freeze_ms, changed.memory.give_up) == ("stop-copy", 20.0, "abort")


def test_the_example_of_the_documentation_is_a_configuration(folder: Path) -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    assert set(parse(example, folder / "livemove.toml").workloads) == {"counter", "echo"}

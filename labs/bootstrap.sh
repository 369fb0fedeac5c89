# shellcheck shell=bash
# Makes a fresh Debian machine able to run the lab, the demo and the tests; a moment's check where it is already.
# Sourced by labs/lab, labs/demo and tests/run with `set -euo pipefail`; sets LIVEMOVE_PYTHON. Says what it does on
# standard error. What it installs: missing Debian packages; .venv in the repository from requirements.lock.

livemove_root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
livemove_venv=$livemove_root/.venv
LIVEMOVE_PYTHON=$livemove_venv/bin/python

livemove_say() { printf '• %s\n' "$*" >&2; }

livemove_fail() {
    printf 'Error: %s\n' "$*" >&2
    exit 1
}

livemove_check_machine() {
    [[ $EUID -eq 0 ]] || livemove_fail "the lab makes namespaces and mounts, which takes root; run it as root: sudo $0"
    command -v python3 >/dev/null || livemove_fail "python3 is missing; run: apt-get install python3"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        livemove_fail "$(python3 --version) is too old; put Python 3.11 or newer first in PATH as python3"
}

# Bit 24 of capabilities(7). Without it labs/services needs a C compiler: see labs/limits.py.
livemove_has_sys_resource() { ((16#$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status) >> 24 & 1)); }

# Prints the Debian packages that are missing, one a line.
livemove_missing_packages() {
    local pair
    for pair in mmdebstrap:mmdebstrap nft:nftables tcpdump:tcpdump ip:iproute2 ssh:openssh-client \
        ssh-keygen:openssh-client umount:mount nsenter:util-linux flock:util-linux; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
    done | sort -u
    livemove_has_sys_resource || command -v cc >/dev/null || echo gcc
    # Only needed to make the environment, and slow to ask about.
    [[ -x $LIVEMOVE_PYTHON ]] || python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

livemove_install_packages() {
    local missing
    mapfile -t missing < <(livemove_missing_packages)
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || livemove_fail "install these first, there is no apt-get here: ${missing[*]}"
    livemove_say "Installing Debian packages: ${missing[*]}"
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    } >/dev/null || livemove_fail "apt-get could not install: ${missing[*]}; see its messages above"
}

# What the environment is made from; it is made anew when this changes.
livemove_fingerprint() {
    { cat "$livemove_root/requirements.lock" "$livemove_root/pyproject.toml" && python3 --version &&
        echo "$livemove_root"; } | sha256sum
}

# Whether the environment's interpreter runs, and is the one that a new environment would have.
livemove_python_matches() {
    [[ $("$LIVEMOVE_PYTHON" --version 2>/dev/null) == "$(python3 --version)" ]] &&
        "$LIVEMOVE_PYTHON" -c 'import pip' 2>/dev/null
}

livemove_environment_is_current() {
    [[ -r $livemove_venv/stamp && $(<"$livemove_venv/stamp") == "$1" ]] && "$LIVEMOVE_PYTHON" -c '' 2>/dev/null
}

livemove_make_environment() {
    local fingerprint lock
    fingerprint=$(livemove_fingerprint)
    livemove_environment_is_current "$fingerprint" && return
    # Two first runs at once: the second waits, and finds the work done.
    exec {lock}<"$livemove_root/requirements.lock"
    flock "$lock"
    if ! livemove_environment_is_current "$fingerprint"; then
        livemove_say "Installing Python packages into .venv"
        livemove_python_matches || python3 -m venv --clear "$livemove_venv"
        local install=("$LIVEMOVE_PYTHON" -m pip install --quiet --quiet --disable-pip-version-check)
        "${install[@]}" --require-hashes -r "$livemove_root/requirements.lock" >&2
        # A plain path file, so that labs is found too, wherever a command is called from.
        "${install[@]}" --no-deps --no-build-isolation --config-settings editable_mode=compat -e "$livemove_root" >&2
        echo "$fingerprint" >"$livemove_venv/stamp"
    fi
    exec {lock}<&-
}

livemove_check_machine
livemove_install_packages
livemove_make_environment

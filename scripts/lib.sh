# What scripts/demo, scripts/test and scripts/bench share: install what is missing, once.
#
# Sourced, never run.  It owns the checkout's virtual environment (.venv) and knows which
# Debian packages each purpose needs.  Everything is idempotent: what is there is not
# touched, and a second run needs no network.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv

packages_run=(gcc libc6-dev python3-dev python3-venv qemu-system-x86 qemu-system-common qemu-utils xz-utils)
packages_kernel=(bc bison flex libelf-dev libssl-dev linux-source-6.1 make)
packages_test=(acpica-tools busybox-static e2fsprogs fio git kmod)
pip_run=('meson>=1.3' ninja 'Cython>=3.1,<4' 'meson-python>=0.18' lz4 zstandard)
pip_fuzz=(atheris)
pip_test=(numpy pytest pytest-timeout hypothesis mypy ruff cython-lint python-ptrace "${pip_fuzz[@]}")

# say TEXT: progress for a person; silent when nobody watches.
say() {
    if [ -t 2 ]; then printf '\033[2m[setup]\033[0m %s\n' "$*" >&2; fi
}

# cache_directory NAME: where pyvmm keeps it; relative settings are ignored, as in pyvmm.cache.
cache_directory() {
    case "${XDG_CACHE_HOME:-}" in
    /*) echo "$XDG_CACHE_HOME/pyvmm/$1" ;;
    *) echo "$HOME/.cache/pyvmm/$1" ;;
    esac
}

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# quietly TEXT CMD...: run CMD under the heading TEXT; show its output only if it fails.
quietly() {
    local text=$1 log
    shift
    say "$text"
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "$text: failed (the last lines are above): $*"
    fi
    rm -f "$log"
}

missing_packages() {
    local package
    for package in "$@"; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            echo "$package"
        fi
    done
}

# need_packages PACKAGE...: install the Debian packages that are not installed.
need_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "as root, once: apt-get install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! apt-get install -qq --no-install-recommends -s "${missing[@]}" >/dev/null 2>&1; then
        quietly "refreshing the package lists" apt-get update -qq
    fi
    if ! apt-get install -qq --no-install-recommends -y "${missing[@]}" >/dev/null 2>&1 </dev/null; then
        # Package lists that are some days old name files that are gone.
        quietly "refreshing the package lists" apt-get update -qq
        quietly "installing ${missing[*]}" apt-get install -qq --no-install-recommends -y "${missing[@]}"
    fi
}

system_python() {
    local candidate
    for candidate in /usr/bin/python3 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed"
}

# need_modules REQUIREMENT...: install Python requirements into the environment, once per list.
need_modules() {
    local stamp
    stamp=$venv/.modules-$(printf '%s\n' "$@" | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && return 0
    quietly "installing Python packages: $*" \
        "$venv/bin/python" -m pip install --disable-pip-version-check -q "$@"
    touch "$stamp"
}

source_hash() {
    (cd "$top" && find meson.build pyproject.toml bin native pyvmm guest-images -type f \
        -not -name '*.so' -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32)
}

# need_pyvmm: the environment holds a wheel built from this very source.
need_pyvmm() {
    local hash stamp=$venv/.pyvmm
    if [ ! -x "$venv/bin/python" ]; then
        quietly "creating the virtual environment" "$(system_python)" -m venv "$venv"
    fi
    need_modules "${pip_run[@]}"
    hash=$(source_hash)
    [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ] && [ -x "$venv/bin/pyvmm" ] && return 0
    rm -f "$stamp"
    quietly "building pyvmm" env PATH="$venv/bin:$PATH" "$venv/bin/python" -m pip install \
        --disable-pip-version-check -q --no-build-isolation --no-deps --force-reinstall "$top"
    echo "$hash" >"$stamp"
}

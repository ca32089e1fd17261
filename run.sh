#!/bin/sh
# The proxy from a clone, with nothing installed but Python: makes .venv, installs what is needed, starts.
#
#   ./run.sh [ARGUMENTS]   start the proxy; arguments go to litellm_memory_proxy.py (--help lists them)
#   ./run.sh test [ARGS]   run test_proxy.py; ARGS go to pytest
#   ./run.sh clients       run Claude Code, Codex and opencode against the proxy; installs them from npm into .clients
#   ./run.sh bench [WORDS] measure the proxy beside nginx, LiteLLM's server and the bare SDK; the README shows the table
#   ./run.sh oldest        sdk mode's tests on the oldest LiteLLM that the metadata allows, in .venv-oldest
#   ./run.sh newest        the same on the newest, in .venv-newest: its server often wants an older one, sdk mode does not
#   ./run.sh lint          ruff and mypy --strict
#
# VENV=DIR takes another virtual environment than .venv.
set -eu

self=$(readlink -f "$0" 2>/dev/null || echo "$0") # a symlink to it may lie on the PATH
here=$(cd "$(dirname "$self")" && pwd)
module=$here/litellm_memory_proxy.py
venv=${VENV:-$here/.venv}
case ${1-} in oldest | newest) venv=$here/.venv-$1 ;; esac
py=$venv/bin/python
stamp=$venv/.installed # the requirements that are there, one a line: a second start installs nothing

say() { echo "run.sh: $*" >&2; }
die() { say "$*"; exit 2; }

# Requirements stand in the module's PEP 723 metadata and nowhere else.
requirements() { sed -n '/^# dependencies = \[/,/^# \]/s/^#  *"\(.*\)",*$/\1/p' "$module"; }
server_requirement() { requirements | sed -n 's/^litellm/litellm[proxy]/p'; }

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.10 or later is needed"
}

make_venv() {
    "$py" -c '' 2>/dev/null && return
    rm -rf "$venv"
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python '>=3.10' "$venv"
    else
        python=$(find_python)
        "$python" -m venv "$venv" || die "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
    fi
}

litellm_version() { "$py" -c 'from importlib.metadata import version; print(version("litellm"))' 2>/dev/null; }

# need WHAT REQUIREMENT...: install what is not there yet; WHAT tells the user what for, and how much it is.
need() {
    what=$1
    shift
    missing=0
    for requirement; do grep -qxF -e "$requirement" "$stamp" 2>/dev/null || missing=1; done
    [ $missing = 1 ] || return 0
    say "installing $what: $*"
    before=$(litellm_version) || before=
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$py" "$@"
    else
        "$py" -m pip install --quiet --disable-pip-version-check "$@"
    fi
    for requirement; do echo "$requirement" >>"$stamp"; done
    after=$(litellm_version) || after=
    [ "${before:-$after}" = "$after" ] || # the server's may be an older one; LiteLLM loads much of itself only later
        say "LiteLLM $before is now $after: a proxy that runs from here fails until it is started again"
}

need_lines() { # need WHAT, with the requirements from standard input, one a line
    what=$1
    set --
    while read -r line; do set -- "$@" "$line"; done
    need "$what" "$@"
}

make_venv
if [ "${1-}" = oldest ]; then
    requirements | sed 's/^litellm>=\([0-9.]*\).*/litellm==\1/' | need_lines "the oldest LiteLLM that is allowed (450 MB)"
else
    requirements | need_lines "the proxy (450 MB, about a minute)"
fi

case ${1-} in
test | clients | bench)
    server_requirement | need_lines "LiteLLM's server, for binary mode (300 MB more)"
    need "the tests' tools" 'pytest>=8,<10' 'openai' 'anthropic' 'prometheus_client'
    cd "$here"
    [ "$1" = test ] || exec "$py" test_proxy.py "$@"
    shift
    exec "$py" -m pytest test_proxy.py "$@"
    ;;
oldest | newest)
    need "the tests' tools" 'pytest>=8,<10' 'prometheus_client'
    cd "$here"
    exec "$py" test_proxy.py sdk
    ;;
lint)
    need "the linters" 'ruff==0.17.*' 'mypy==2.4.*' 'types-PyYAML' 'pytest>=8,<10'
    cd "$here"
    "$py" -m ruff check litellm_memory_proxy.py test_proxy.py
    "$py" -m ruff format --check litellm_memory_proxy.py test_proxy.py
    exec "$py" -m mypy --strict litellm_memory_proxy.py
    ;;
*)
    # Run from elsewhere, the shipped config stands in for one that is not there.
    [ -e config.yaml ] || export CONFIG_PATH="${CONFIG_PATH:-$here/config.yaml}"
    if "$py" -c 'import sys; sys.path.insert(0, sys.argv[1])
import litellm_memory_proxy as proxy; sys.exit(not proxy.needs_server(sys.argv[2:]))' "$here" "$@" >/dev/null 2>&1; then
        server_requirement | need_lines "LiteLLM's server, for binary mode (300 MB more)"
    fi
    exec "$py" "$module" "$@"
    ;;
esac

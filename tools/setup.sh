# Sourced by demo.sh and run_tests.sh, in the repository's folder. `setup FILE...` makes .venv, installs the requirements
# in the files unless that was done before, and sets PYTHON to its interpreter. PYTHON=python3.12 chooses another.

setup() {
    local python=${PYTHON:-python3} file missing=()
    if ! command -v "$python" >/dev/null; then
        echo "$python is missing: install Python 3.10 or newer, or name it with PYTHON=..." >&2
        return 2
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "$("$python" --version) is too old: install Python 3.10 or newer, or name it with PYTHON=..." >&2
        return 2
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "$python cannot make virtual environments: install python3-venv (Debian, Ubuntu: apt install python3-venv)" >&2
        return 2
    fi
    if [ ! -x .venv/bin/pip ]; then
        "$python" -m venv .venv
    fi
    for file in "$@"; do
        cmp -s "$file" ".venv/$file" || missing+=(-r "$file")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "Installing into .venv what $* name: some minutes and 6 GB the first time, mostly torch"
        .venv/bin/pip install --disable-pip-version-check "${missing[@]}"
        cp "$@" .venv/
    fi
    export PYTHON=$PWD/.venv/bin/python
}

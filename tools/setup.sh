# Sourced by the other scripts.

# `setup FILE...`, in the repository's folder: makes .venv, installs the requirements in the files unless that was done
# before, and sets PYTHON to its interpreter. PYTHON=python3.12 chooses the one that it is made with.
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
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear .venv
    fi
    for file in "$@"; do
        cmp -s "$file" ".venv/$file" || missing+=(-r "$file")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "Installing into .venv what $* name: some minutes and 6 GB the first time, mostly torch"
        .venv/bin/python -m pip install --disable-pip-version-check "${missing[@]}"
        cp "$@" .venv/
    fi
    export PYTHON=$PWD/.venv/bin/python
}

# `find_python FOLDER`: sets python to $PYTHON or, where that is not set, to the environment in the repository's FOLDER,
# else to python3.
find_python() {
    python=${PYTHON:-$1/.venv/bin/python}
    if ! command -v "$python" >/dev/null; then
        if [ -n "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON: there is no such program" >&2
            return 2
        fi
        python=python3
    fi
}

# `name_run WORD`: where WORD is a benchmark's name, a YAML file, or nothing that exists, sets benchmark to WORD and run to
# $RUN or runs/<its name>; else, where it is a folder or file, benchmark to nothing and run to $RUN or runs/sam2unext.
name_run() {
    benchmark=$1
    case "${1^^}" in
        DIS5K | COD | MAS3K | RMAS | EORSSD | ORSI-4199) run=${1^^} ;;
        ORSI4199) run=ORSI-4199 ;;
        *.YAML | *.YML) run=$(basename "${1%.*}") ;;
        */*) benchmark="" run=sam2unext ;;
        *)
            run=$1
            if [ -e "$1" ]; then
                benchmark="" run=sam2unext
            fi
            ;;
    esac
    run=${RUN:-runs/$run}
}

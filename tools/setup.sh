# Sourced by the other scripts. By itself it installs what a tool needs:
#
#     bash tools/setup.sh requirements-export.txt requirements-app.txt

# Threads of OpenMP spin while they wait for each other; long, they would take shared cores from others (docs/speed.md).
if [ -z "${OMP_WAIT_POLICY:-}" ]; then
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi

here=$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")  # of the script; links are followed

# `setup FILE...`, in the repository's folder: makes .venv with PYTHON (python3), installs the requirements in the files
# unless they are installed, and sets PYTHON to the interpreter of .venv.
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
        .venv/bin/python -m ensurepip >/dev/null 2>&1 || "$python" -m venv --clear .venv  # uv makes one without pip
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

# `find_python FOLDER`: sets python to $PYTHON, else to that of .venv in FOLDER, else to python3; and launch to the command
# that starts a program on $GPUS GPUs.
find_python() {
    python=${PYTHON:-$1/.venv/bin/python}
    if ! command -v "$python" >/dev/null; then
        if [ -n "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON: there is no such program" >&2
            return 2
        fi
        python=python3
    fi
    launch=("$python")
    if ! [[ ${GPUS:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "GPUS=$GPUS: is not a number of GPUs" >&2
        return 2
    elif [ "${GPUS:-1}" != 1 ]; then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
    fi
}

# `read_words MIN ARGUMENT...`, in a recipe beside tools/: finds Python and names the run. Shows the recipe's usage for
# fewer arguments than MIN, or options first.
read_words() {
    local min=$1
    shift
    if [ $# -lt "$min" ] || [[ $1 == -* ]]; then
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        return 2
    fi
    find_python "$here"
    name_run "$1" "${2:-}"
}

# `name_run NAME [ROOT]`: for a benchmark of the paper, in any case, or a YAML file, sets benchmark to NAME and run to $RUN
# or runs/<its name>; for another file or a folder, sets benchmark to nothing and run to $RUN or runs/sam2unext.
name_run() {
    local answer
    answer=$("$python" -c 'import sys
sys.path[0] = sys.argv[1]
try:
    from evaluation import benchmarks
except ImportError as error:
    sys.exit(f"{sys.executable}: {error}; bash tools/setup.sh installs what is missing, into .venv")
print(benchmarks.run_name(sys.argv[2]), benchmarks.NAMES, sep="\n")' "$here" "$1") || return 2
    benchmark=$1 run=${answer%%$'\n'*}
    if [ -n "$run" ] && [ ! -d "${2:-}" ]; then
        echo "$(basename "$0"): $1 needs the folder of its archive after it; ${2:-nothing} is no folder" >&2
        return 2
    elif [ -z "$run" ]; then
        benchmark="" run=sam2unext
        if [ ! -e "$1" ]; then
            echo "$(basename "$0"): there is no folder or file $1, and no benchmark of that name (${answer#*$'\n'})" >&2
            return 2
        fi
    fi
    run=${RUN:-runs/$run}
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    cd "$here/.."
    for file in "$@"; do
        if [ ! -f "$file" ]; then
            echo "setup.sh: there is no file $file" >&2
            exit 2
        fi
    done
    setup requirements.txt "$@"
fi

# Sourced by the other scripts. By itself it installs what a tool needs:
#
#     bash tools/setup.sh requirements-export.txt requirements-app.txt

here=$(dirname "$0")  # of the script

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
# else to python3; and launch to what starts a program on $GPUS GPUs.
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
    if [ "${GPUS:-1}" != 1 ]; then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
    fi
}

# `read_words LEAST WORD...`, in a recipe beside tools/: finds Python and names the run; sets data to the options of
# a benchmark, if WORD names one, and words to those that are left. Shows how the recipe is used where there are fewer
# words than LEAST or options come first.
read_words() {
    local least=$1
    shift
    if [ $# -lt "$least" ] || [[ $1 == -* ]]; then
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        return 2
    fi
    find_python "$here"
    name_run "$1" "${2:-}"
    data=() words=("$@")
    if [ -n "$benchmark" ]; then
        data=(--benchmark "$1" "$2") words=("${@:3}")
    fi
}

# `name_run WORD [ROOT]`: where WORD is a benchmark's name or a YAML file, sets benchmark to WORD and run to $RUN or
# runs/<its name>; where it is a folder or file, sets benchmark to nothing and run to $RUN or runs/sam2unext.
name_run() {
    benchmark=$1
    case "${1^^}" in
        DIS5K | COD | MAS3K | RMAS | EORSSD | ORSI-4199) run=${1^^} ;;
        ORSI4199) run=ORSI-4199 ;;
        *.YAML | *.YML) run=$(basename "${1%.*}") ;;
        *) benchmark="" run=sam2unext ;;
    esac
    run=${RUN:-runs/$run}
    if [ -n "$benchmark" ] && [ ! -d "${2:-}" ]; then
        echo "$(basename "$0"): $1 needs the folder of its archive after it; ${2:-nothing} is no folder" >&2
        return 2
    elif [ -z "$benchmark" ] && [ ! -e "$1" ]; then
        echo "$(basename "$0"): there is no folder or file $1, and no benchmark of that name (DIS5K, COD, MAS3K, RMAS," \
            "EORSSD, ORSI-4199 or a YAML file)" >&2
        return 2
    fi
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

#!/usr/bin/env bash
# For maintainers: the fast tests on processors of other kinds, with other Pythons, and in the background. Takes 20
# minutes and 12 GB in a temporary folder; ends with a table.
#
#     bash tests/matrix.sh                       all rows
#     bash tests/matrix.sh AVX2 3.13             those whose name contains one of the words
#
# Instruction sets are limited by the switches of torch, oneDNN and MKL, native bf16 is pretended and hidden. Python 3.10
# gets the lowest versions that requirements.txt allows, 3.13 the newest; both are looked for in PATH and ~/.pyenv. The
# other rows run in the environment that run_tests.sh makes, or with $PYTHON. $LOGS keeps what each row prints. As in
# run_tests.sh, the tests run in several processes of one thread, but for "single process", which has all threads.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
logs=${LOGS:-$folder}
mkdir -p "$logs"
table=$folder/table failed=0
spread="-n $(($(nproc) < 4 ? $(nproc) : 4)) --dist loadgroup"
export OMP_NUM_THREADS=1  # which nproc would heed
export PYTEST_DEBUG_TEMPROOT=$folder  # two sessions of pytest in one folder remove each other's files

# `run NAME COMMAND...`: a row of the table; the command gets pytest's arguments.
run() {
    local name=$1 log=$logs/${1//[^A-Za-z0-9.]/_}.log start=$SECONDS verdict=ok tests="not slow"
    shift
    echo "== $name"
    if [[ $* == *ATEN_CPU_CAPABILITY=default* ]] && grep -q amx_bf16 /proc/cpuinfo &&
        ! "$@" -m pytest -q -m "half and not slow" tests/test_precision.py >"$log" 2>&1 </dev/null; then
        tests="not slow and not half" name="$name, fp32 only: torch fails in half precision there"
    fi
    # shellcheck disable=SC2086  # several words
    "$@" -m pytest -q $spread -m "$tests" >"$log" 2>&1 </dev/null || verdict=FAILED failed=1
    [ "$verdict" = ok ] || grep -E "^(FAILED|ERROR)|Error" "$log" | head -n 20 || true
    printf '| %s | %s | %s | %d s |\n' "$name" "$verdict" "$(grep -E ' (passed|failed|error).* in ' "$log" | tail -n 1 | sed 's/ in .*//; s/=* *//')" \
        $((SECONDS - start)) | tee -a "$table"
}

# `wanted NAME`: whether the row is asked for.
wanted() {
    local name=$1 word
    shift
    [ ${#words[@]} -gt 0 ] || return 0
    for word in "${words[@]}"; do
        [[ $name != *"$word"* ]] || return 0
    done
    return 1
}

# `environment VERSION LINES`: makes an environment of that Python with requirements of these lines, sets $made to it.
environment() {
    local version=$1 lines=$2 python found
    made=$folder/$version
    for found in "$(command -v "python$version" || true)" "$HOME"/.pyenv/versions/"$version".*/bin/python; do
        if [ -x "$found" ] && "$found" -c 'import venv, ensurepip' 2>/dev/null; then
            python=$found
        fi
    done
    if [ -z "${python:-}" ]; then
        echo "matrix.sh: no Python $version in PATH or ~/.pyenv" >&2
        return 1
    fi
    echo "$lines" >"$folder/requirements.txt"
    "$python" -m venv "$made" &&
        "$made/bin/python" -m pip install -q --disable-pip-version-check \
            -r "$folder/requirements.txt" -r requirements-test.txt >"$logs/install-$version.log" 2>&1
}

in_background() {
    setsid nohup "$@" &
    wait $!
}

words=("$@")
python=${PYTHON:-$PWD/.venv/bin/python}
wanted "as it is" && run "as it is" "$python"
wanted "single process" && spread="-n 0" run "single process" env -u OMP_NUM_THREADS "$python"
wanted "AVX2" && run "AVX2" env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 "$python"
wanted "SSE4.1" &&
    run "SSE4.1" env ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 "$python"
wanted "native bf16 pretended" && run "native bf16 pretended" env PRETENDED_CPU_FLAGS=avx512_bf16 "$python"
wanted "native bf16 hidden" && run "native bf16 hidden" env PRETENDED_CPU_FLAGS=fpu "$python"
wanted "in the background" && run "in the background" in_background "$python"
lowest=$(sed -n 's/^\([a-z0-9_-]*\)>=\([0-9.]*\),.*/\1==\2.*/p' requirements.txt)
newest=$(grep -h '^[a-z]' requirements.txt requirements-export.txt)
for row in "3.10 lowest" "3.13 newest"; do
    read -r version kind <<<"$row"
    name="Python $version, $kind versions"
    if wanted "$name"; then
        if environment "$version" "${!kind}"; then
            run "$name" "$made/bin/python"
            rm -rf "$made"
        else
            tail -n 3 "$logs/install-$version.log" 2>/dev/null || true
            echo "| $name | NOT INSTALLED | | |" | tee -a "$table"
            failed=1
        fi
    fi
done

processor=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)
printf '\n| %s, %s cores | | | |\n|---|---|---|---|\n' "$processor" "$(env -u OMP_NUM_THREADS nproc)"
cat "$table"
exit $failed

#!/usr/bin/env bash
# Makes the environment and runs the tests in a process for each core, at most four; arguments go to pytest.
#
#     bash run_tests.sh                   all of them
#     bash run_tests.sh -m "not slow"     the fast ones
#     bash run_tests.sh -n 0              in a single process
set -euo pipefail
cd "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")"
source tools/setup.sh
setup requirements.txt requirements-test.txt requirements-export.txt
processes=$("$PYTHON" -c "from unext.workers import cores; print(min(4, cores()))")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n "$processes" --dist loadgroup "$@"

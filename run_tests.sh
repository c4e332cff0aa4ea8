#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest.
#
#     bash run_tests.sh                   all of them
#     bash run_tests.sh -m "not slow"     the fast ones
set -euo pipefail
cd "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")"
source tools/setup.sh
setup requirements.txt requirements-test.txt requirements-export.txt
exec "$PYTHON" -m pytest "$@"

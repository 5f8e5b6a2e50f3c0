#!/usr/bin/env bash
# Makes .venv, installs, runs the tests but for the slow ones.
#   launch/test.sh
#   launch/test.sh -m '' -n 2 --dist=loadfile    # all, in two processes
#   launch/test.sh tests/objectives              # all of these
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ $# -gt 0 ] || set -- -m 'not slow' -n 2 --dist=loadfile
exec .venv/bin/python -m pytest "$@"

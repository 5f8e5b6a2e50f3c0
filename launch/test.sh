#!/usr/bin/env bash
# Makes .venv, installs, runs the tests but for the slow ones, in two processes.
#   launch/test.sh
#   launch/test.sh -m ''                # all
#   launch/test.sh tests/objectives     # all of these
#   launch/test.sh -n 0 …               # in one process, for -s and --pdb
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ $# -gt 0 ] || set -- -m 'not slow'
exec .venv/bin/python -m pytest -n 2 --dist=loadfile "$@"

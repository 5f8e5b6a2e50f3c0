#!/usr/bin/env bash
# Makes .venv, installs, runs the tests.
#   launch/test.sh
#   launch/test.sh -m 'not slow' tests/objectives
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python -m pytest "$@"
